"""Ideogram 4: text and image in one sequence from the first layer on; a network of its own for unconditional rows."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.transformers.transformer_ideogram4 import (
    IMAGE_POSITION_OFFSET,
    LLM_TOKEN_INDICATOR,
    OUTPUT_IMAGE_INDICATOR,
    SEQUENCE_PADDING_INDICATOR,
)
from torch import Tensor, nn
from torch.nn.functional import pad

from lora_compose.attention.backbones.joint import PATCH, JointBackbone, image_positions
from lora_compose.attention.device import dtype_of, uncompiled
from lora_compose.attention.sites import Grid, Site


class Ideogram4Backbone(JointBackbone):
    """An `Ideogram4Transformer2DModel`.

    Args:
        unconditional: The network that runs unconditional rows, on the image alone, without LoRAs; None where there are
            no such rows.
    """

    table = (
        # The embedders of text and image see the whole sequence, and are masked behind it.
        (
            r"input_proj|llm_cond_proj|final_layer\.linear"
            r"|layers\.\d+\.(attention\.to_([qkv]|out\.0)|feed_forward\.w[123])",
            Site("text", "image", level=1),
        ),
        (r"t_embedding\.mlp_(in|out)", Site("modulation")),
        # One vector per row, with an extra position dimension of length 1.
        (r"adaln_proj|(layers\.\d+|final_layer)\.adaln_modulation", Site("modulation", extra_axis=True)),
    )
    blocks = ("layers",)
    unconditional_apart = True
    hides_padding = True

    def __init__(self, model: nn.Module, unconditional: nn.Module | None = None) -> None:
        super().__init__(model)
        self._unconditional = unconditional

    @property
    def native_side(self) -> int:
        """Side of the latents at the native resolution of 2048 pixels, in cells."""
        return 256

    def forward(
        self, latents: Tensor, t: Tensor, text: Tensor, added: Mapping[str, Tensor] | None, **inputs: Any
    ) -> Tensor:
        """As `Backbone.forward`; the velocity is in fp32, and the model itself returns its negative.

        Args:
            text: Features of 13 layers of the text encoder, padded. Shape: [rows, tokens, channels].
            added: "text_mask", True where tokens are not padding; "text_positions", if several texts follow one
                another, shape [rows, tokens] each; and "unconditional", on the CPU, which is the same for all rows.
            inputs: "attention_kwargs".
        """
        added = added or {}
        rows, tokens = len(latents), tokens_of(latents)
        unconditional = set(added["unconditional"].tolist())
        if len(unconditional) > 1:
            raise ValueError("unconditional rows have a network of their own, and cannot be run together with others")
        model: Any = self._unconditional if True in unconditional else self.model
        length = 0 if True in unconditional else text.shape[1]
        real = added["text_mask"][:, :length]
        positions = added.get("text_positions", torch.arange(length, device=text.device).expand(rows, -1))[:, :length]
        image = (image_positions(latents, torch.long) + IMAGE_POSITION_OFFSET).expand(rows, -1, -1)
        seen = image.new_ones(tokens.shape[:2])
        dtype = dtype_of(uncompiled(model))
        velocity = model(
            hidden_states=pad(tokens, (0, 0, length, 0)).to(dtype),
            timestep=(1 - t.float() / 1000).expand(rows).to(dtype),
            encoder_hidden_states=pad(text[:, :length].to(dtype), (0, 0, 0, tokens.shape[1])),
            position_ids=torch.cat([positions[..., None].expand(-1, -1, 3).long(), image], dim=1),
            segment_ids=torch.cat([torch.where(real, 1, SEQUENCE_PADDING_INDICATOR), seen], dim=1),
            indicator=torch.cat([torch.where(real, LLM_TOKEN_INDICATOR, 0), seen * OUTPUT_IMAGE_INDICATOR], dim=1),
            return_dict=False,
            **inputs,
        )[0]
        return -from_tokens(velocity[:, length:].float(), latents.shape[-2:])


def tokens_of(latents: Tensor) -> Tensor:
    """Patches as tokens, whose channels are by row, column and channel. Shape: [rows, cells, 4 * channels]."""
    patches = latents.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))
    return patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def from_tokens(tokens: Tensor, grid: Grid | torch.Size) -> Tensor:
    """Tokens back to latents of a height and width."""
    height, width = (side // PATCH for side in grid)
    patches = tokens.unflatten(2, (PATCH, PATCH, -1)).unflatten(1, (height, width))
    return patches.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
