"""FLUX.2: double-stream, then single-stream blocks whose queries, keys, values and first MLP layer are one layer."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_compose.attention.backbones.joint import (
    PATCH,
    JointBackbone,
    image_positions,
    packed,
    unpacked,
    with_references,
    word_positions,
)
from lora_compose.attention.sites import Grid, Site

REFERENCE = 10
"""The first of the four position ids of the n-th reference image is so many times n; that of the image is 0."""


class Flux2Backbone(JointBackbone):
    """A `Flux2Transformer2DModel`."""

    table = (
        # All blocks share three modulation layers.
        (
            r"time_guidance_embed\.\w+_embedder\.linear_[12]|\w+_modulation(_\w+)?\.linear|norm_out\.linear",
            Site("modulation"),
        ),
        (r"single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)", Site("text", "image", level=1)),
        (
            r"context_embedder|transformer_blocks\.\d+\.(attn\.(add_[qkv]_proj|to_add_out)|ff_context\.linear_\w+)",
            Site("text"),
        ),
        (
            r"x_embedder|proj_out|transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0)|ff\.linear_\w+)",
            Site("image", level=1),
        ),
    )
    blocks = ("transformer_blocks", "single_transformer_blocks")

    def forward(
        self,
        latents: Tensor,
        t: Tensor,
        text: Tensor,
        added: Mapping[str, Tensor] | None,
        reference: Tensor | None = None,
        reference_grids: Sequence[Grid] = (),
        guidance: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """As `Backbone.forward`.

        Args:
            text: Hidden states of several layers of the text encoder, concatenated. Shape: [rows, tokens, layers *
                channels].
            added: "text_positions" of the tokens, with several texts in one sequence. Shape: [rows, tokens].
            reference: Latents of a reference image, shape: as the latents; or tokens of several, one after the other.
                Shape: [rows, tokens, channels].
            reference_grids: Height and width of each of several, in tokens.
            guidance: The scale of distilled guidance, of FLUX.2-dev. Shape: [rows].
            inputs: "joint_attention_kwargs".
        """
        # Ids are (image, row, column, word), and the same in all rows.
        image = torch.nn.functional.pad(image_positions(latents, torch.int64), (0, 1))
        tokens, cells = packed(latents), len(image)
        if reference is not None:
            several = reference if reference.dim() == 3 else packed(reference)
            grids = reference_grids or [(latents.shape[-2] // PATCH, latents.shape[-1] // PATCH)]
            tokens, image = with_references(tokens, image, several, grids, REFERENCE)
        velocity = self.model(
            hidden_states=tokens.to(text.dtype),
            encoder_hidden_states=text,
            timestep=t.expand(len(latents)).to(latents.dtype) / 1000,
            img_ids=image,
            txt_ids=torch.nn.functional.pad(word_positions(text, added)[:, None], (3, 0)),
            guidance=guidance,
            return_dict=False,
            **inputs,
        )[0]
        return unpacked(velocity[:, :cells], latents.shape[-2:])
