"""Z-Image: image before text in one sequence, after separate refiner blocks for each; rows of different lengths."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF
from torch import Tensor

from lora_compose.attention.backbones.joint import JointBackbone
from lora_compose.attention.device import dtype_of, uncompiled
from lora_compose.attention.sites import Site, SitePart

_LAYER = r"(attention\.to_(q|k|v|out\.0)|feed_forward\.w[123])"
"""The layers of every block."""


def _site(*parts: SitePart, flat: bool = False) -> Site:
    return Site(*parts, level=int("image" in parts), multiple=SEQ_MULTI_OF, flat=flat)


class ZImageBackbone(JointBackbone):
    """A `ZImageTransformer2DModel`."""

    table = (
        (r"t_embedder\.mlp\.\d|.+\.adaLN_modulation\.\d", _site("modulation")),
        # The embedders see the tokens of all rows as one list.
        (r"cap_embedder\.1", _site("text", flat=True)),
        (rf"context_refiner\.\d+\.{_LAYER}", _site("text")),
        (r"all_x_embedder\.[\d-]+", _site("image", flat=True)),
        (rf"noise_refiner\.\d+\.{_LAYER}", _site("image")),
        (rf"layers\.\d+\.{_LAYER}|all_final_layer\.[\d-]+\.linear", _site("image", "text")),
    )
    blocks = ("layers",)
    attends = (("context_refiner.", ("text",)), ("noise_refiner.", ("image",)))

    def forward(
        self, latents: Tensor, t: Tensor, text: Tensor, added: Mapping[str, Tensor] | None, **inputs: Any
    ) -> Tensor:
        """As `Backbone.forward`; the velocity is in fp32, and the model itself returns its negative.

        The text are padded features; `added` has "lengths" [rows], on the CPU: the tokens of each row without padding.
        `inputs` may have "joint_attention_kwargs".
        """
        model: Any = uncompiled(self.model)
        lengths = (added or {})["lengths"].tolist()
        velocities = self.model(
            list(latents.to(dtype_of(model))[:, :, None]),
            (1000 - t.expand(len(latents))) / 1000,
            [row[:length] for row, length in zip(text, lengths, strict=True)],
            return_dict=False,
            **inputs,
        )[0]
        return -torch.stack(velocities)[:, :, 0].float()
