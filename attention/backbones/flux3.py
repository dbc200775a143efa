"""FLUX.3: blocks for text, image and reference images each alone, then for all of them in one sequence."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_compose.attention.backbones.joint import PATCH, JointBackbone, packed, unpacked, word_positions
from lora_compose.attention.joint_kernel import JointKernel
from lora_compose.attention.sites import Grid, Site

ROTARY_SCALE = 0.5
"""Position ids of rows and columns are so many times their numbers."""

_BLOCK = r"\d+\.(attn\.to_([qkv]|out\.0)|ff\.linear_(in|out))"
"""The layers of every block."""


class ReadTextKernel(JointKernel):
    """Attention in which each row sees its own text, which may have fewer tokens than those of other rows."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        """As `JointKernel`; the model itself has no masks."""
        end = self.state.inputs.text_end
        if end is not None and "text" in self.site.parts:
            attn_mask = nn.functional.pad(end, (0, key.shape[1] - end.shape[-1]))
        return super().__call__(query, key, value, attn_mask, **options)


class Flux3Backbone(JointBackbone):
    """A `Flux3Transformer2DModel`.

    Its modulation layers have an input for each token, so that they are gated as what they modulate is.
    """

    table = (
        (r"(target_)?timestep_embedder\.linear_[12]", Site("modulation")),
        (rf"context_embedder|txt_mode_blocks\.{_BLOCK}|(early|single)_stream_modulations\.txt\.linear", Site("text")),
        (
            rf"x_embedders\.image|mode_blocks\.image\.{_BLOCK}|(early|single)_stream_modulations\.image\.linear"
            r"|norm_out\.linear|proj_out",
            Site("image", level=1),
        ),
        # They run only if there are references.
        (
            rf"x_embedders\.image_cond|mode_blocks\.image_cond\.{_BLOCK}"
            r"|(early|single)_stream_modulations\.image_cond\.linear",
            Site("reference", level=1, reference_cells=0),
        ),
        (rf"single_transformer_blocks\.{_BLOCK}", Site("text", "image", level=1)),
    )
    blocks = ("single_transformer_blocks",)
    attends = (
        ("txt_mode_blocks.", ("text",)),
        ("mode_blocks.image.", ("image",)),
        ("mode_blocks.image_cond.", ("reference",)),
    )

    def __init__(self, model: nn.Module, reference: bool = False, cells: int | None = None) -> None:
        super().__init__(model)
        self._reference, self._cells = reference, cells
        if reference:  # which lie beside the image in the joint blocks alone
            self.sites = {name: self._with_cells(site) for name, site in self.sites.items()}

    @property
    def _kernel(self) -> type[JointKernel]:
        return ReadTextKernel

    def _with_cells(self, site: Site) -> Site:
        if site.parts == ("reference",):
            return Site("reference", level=site.level, reference_cells=self._cells)
        return site.with_references(self._cells) if site.joint else site

    def forward(
        self,
        latents: Tensor,
        t: Tensor,
        text: Tensor,
        added: Mapping[str, Tensor] | None,
        reference: Tensor | None = None,
        reference_grids: Sequence[Grid] = (),
        timesteps: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """As `Backbone.forward`.

        Args:
            text: Hidden states of several layers of the text encoder, concatenated. Shape: [rows, tokens, layers *
                channels].
            added: "text_positions" of the tokens, with several texts in one sequence. Shape: [rows, tokens].
            reference: Tokens of reference images, one after the other. Shape: [rows, tokens, channels].
            reference_grids: Height and width of each of them, in tokens.
            timesteps: All timesteps of the call, for a distilled model, which reads to which one a step leads. Shape:
                [rows, steps].
            inputs: "attention_kwargs".
        """
        dtype, device = text.dtype, text.device
        if reference is not None:
            inputs["image_cond_hidden_states"] = reference.to(dtype)
            ids = [_positions(grid, device, number) for number, grid in enumerate(reference_grids, 1)]
            inputs["image_cond_ids"] = torch.cat(ids)
        if timesteps is not None:
            following = torch.where(timesteps < t.reshape(-1, 1), timesteps, 0).amax(dim=1)
            inputs["target_timestep"] = (following / 1000).to(dtype)
        height, width = (side // PATCH for side in latents.shape[-2:])
        velocity = self.model(
            hidden_states=packed(latents).to(dtype),
            encoder_hidden_states=text,
            timestep=(t / 1000).expand(len(latents)).to(dtype),
            img_ids=_positions((height, width), device),
            txt_ids=nn.functional.pad(word_positions(text, added)[:, None].float(), (3, 0)),
            return_dict=False,
            **inputs,
        )[0]
        return unpacked(velocity, latents.shape[-2:])


def _positions(grid: Grid, device: torch.device, reference: int = 0) -> Tensor:
    """Ids of an image's tokens, which are time, row, column and word; the word of the n-th reference is -n."""
    ids = torch.zeros(*grid, 4, device=device)
    ids[..., 1] = torch.arange(grid[0], device=device)[:, None] * ROTARY_SCALE
    ids[..., 2] = torch.arange(grid[1], device=device) * ROTARY_SCALE
    ids[..., 3] = -reference
    return ids.flatten(0, 1)
