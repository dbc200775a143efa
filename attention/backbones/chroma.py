"""Chroma: FLUX.1's blocks, whose modulation one small network makes for all of them; text with a mask."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lora_compose.attention.backbones.flux import FluxBackbone
from lora_compose.attention.backbones.joint import JointBackbone, image_positions, packed, unpacked
from lora_compose.attention.sites import Site


class ChromaBackbone(JointBackbone):
    """A `ChromaTransformer2DModel`."""

    table = (
        # A vector for each layer that is modulated, in every row.
        (r"distilled_guidance_layer\.(in_proj|out_proj|layers\.\d+\.linear_[12])", Site("modulation", extra_axis=True)),
        *((pattern, site) for pattern, site in FluxBackbone.table if "modulation" not in site.parts),
    )
    blocks = FluxBackbone.blocks

    def forward(
        self, latents: Tensor, t: Tensor, text: Tensor, added: Mapping[str, Tensor] | None, **inputs: Any
    ) -> Tensor:
        """One forward pass.

        Args:
            latents: Shape: [rows, channels, height, width].
            t: The timestep, 0 to 1000.
            text: Features of the T5 encoder. Shape: [rows, tokens, channels].
            added: "text_mask", 1 where tokens are read, otherwise 0. diffusers adds the products of these numbers to
                the scores, and masks only with a mask of True and False. Shape: [rows, tokens].
            inputs: "joint_attention_kwargs".

        Returns:
            The velocity. Shape: as the latents.
        """
        tokens, mask = packed(latents), (added or {})["text_mask"]
        velocity = self.model(
            hidden_states=tokens,
            encoder_hidden_states=text,
            timestep=t.expand(len(latents)).to(latents.dtype) / 1000,
            img_ids=image_positions(latents),
            txt_ids=torch.zeros(text.shape[1], 3, device=latents.device, dtype=latents.dtype),
            attention_mask=torch.cat([mask, mask.new_ones(tokens.shape[:2])], dim=1),
            return_dict=False,
            **inputs,
        )[0]
        return unpacked(velocity, latents.shape[-2:])
