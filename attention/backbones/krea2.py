"""Krea 2: text and image in one sequence from the first block on; the text's layers are fused inside the model."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lora_compose.attention.backbones.joint import JointBackbone, image_positions, packed, unpacked
from lora_compose.attention.device import uncompiled
from lora_compose.attention.sites import Site

_LAYER = r"(attn\.to_(q|k|v|gate|out\.0)|ff\.(gate|up|down))"
"""The layers of every block."""


class Krea2Backbone(JointBackbone):
    """A `Krea2Transformer2DModel`."""

    table = (
        # One vector per row, with an extra position dimension of length 1.
        (r"time_embed\.linear_[12]|time_mod_proj", Site("modulation", extra_axis=True)),
        # Attention among the layers of the text encoder, for each token apart.
        (rf"text_fusion\.layerwise_blocks\.\d+\.{_LAYER}", Site("text", flat=True, extra_axis=True)),
        (r"text_fusion\.projector", Site("text", extra_axis=True)),
        (rf"text_fusion\.refiner_blocks\.\d+\.{_LAYER}|txt_in\.linear_[12]", Site("text")),
        (rf"transformer_blocks\.\d+\.{_LAYER}", Site("text", "image", level=1)),
        (r"img_in|final_layer\.linear", Site("image", level=1)),
    )
    hides_padding = True
    attends = (("text_fusion.layerwise_blocks.", ("row",)), ("text_fusion.refiner_blocks.", ("text",)))

    def forward(
        self, latents: Tensor, t: Tensor, text: Tensor, added: Mapping[str, Tensor] | None, **inputs: Any
    ) -> Tensor:
        """As `Backbone.forward`.

        Args:
            text: Hidden states of several layers of the text encoder, concatenated. Shape: [rows, tokens, layers *
                channels].
            added: "text_mask", True where tokens are not padding. Shape: [rows, tokens].
            inputs: "attention_kwargs".
        """
        model: Any = uncompiled(self.model)
        image = image_positions(latents, torch.float32)
        velocity = self.model(
            hidden_states=packed(latents),
            encoder_hidden_states=text.unflatten(-1, (model.config.num_text_layers, -1)),
            timestep=(t / 1000).expand(len(latents)).to(latents.dtype),
            position_ids=torch.cat([image.new_zeros(text.shape[1], 3), image]),
            encoder_attention_mask=(added or {})["text_mask"],
            return_dict=False,
            **inputs,
        )[0]
        return unpacked(velocity, latents.shape[-2:])
