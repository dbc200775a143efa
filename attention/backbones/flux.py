"""FLUX.1: text and image tokens in one sequence, in double-stream blocks and then in single-stream ones."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_compose.attention.backbones.joint import JointBackbone, image_positions, packed, unpacked, with_references
from lora_compose.attention.sites import Grid, Site

REFERENCE = 1
"""The first of the three position ids of Kontext's reference image; that of the image is 0."""


class FluxBackbone(JointBackbone):
    """A `FluxTransformer2DModel`."""

    table = (
        # The time embedding is read by modulation layers alone.
        (r"time_text_embed\.\w+_embedder\.linear_[12]|(.+\.)?norm\w*\.linear", Site("modulation")),
        (r"single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out)", Site("text", "image", level=1)),
        (
            r"context_embedder|transformer_blocks\.\d+\.(attn\.(add_[qkv]_proj|to_add_out)|ff_context\.net\..+)",
            Site("text"),
        ),
        (
            r"x_embedder|proj_out|transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0)|ff\.net\..+)",
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
        **inputs: Any,
    ) -> Tensor:
        """As `Backbone.forward`.

        Args:
            text: Features of the T5 encoder. Shape: [rows, tokens, channels].
            added: "pooled_projections" of the CLIP encoder. Shape: [rows, channels].
            reference: Tokens of reference images (Kontext). Shape: [rows, tokens, channels].
            reference_grids: Height and width of each, in tokens.
            inputs: "guidance" of a guidance-distilled model, shape [rows], and "joint_attention_kwargs".
        """
        tokens, positions = packed(latents), image_positions(latents)
        cells = len(positions)
        if reference is not None:
            tokens, positions = with_references(tokens, positions, reference, reference_grids, REFERENCE)
        velocity = self.model(
            hidden_states=tokens,
            encoder_hidden_states=text,
            pooled_projections=(added or {})["pooled_projections"],
            timestep=t.expand(len(latents)).to(latents.dtype) / 1000,
            img_ids=positions,
            txt_ids=torch.zeros(text.shape[1], 3, device=latents.device, dtype=latents.dtype),
            return_dict=False,
            **inputs,
        )[0]
        return unpacked(velocity[:, :cells], latents.shape[-2:])
