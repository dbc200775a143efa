"""Qwen-Image: text and image in one sequence, in double-stream blocks alone; text has rotary positions of its own."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_compose.attention.backbones.joint import PATCH, JointBackbone, packed, unpacked
from lora_compose.attention.claims import Journal
from lora_compose.attention.device import uncompiled
from lora_compose.attention.forward_state import ForwardState
from lora_compose.attention.sites import Grid, Site

_OF_EACH_TIME = re.compile(r"time_text_embed\..+|transformer_blocks\.\d+\.img_mod\.1")
"""Layers that see all rows twice if reference images are read at timestep 0: at the image's, then at 0."""


class QwenImageBackbone(JointBackbone):
    """A `QwenImageTransformer2DModel`."""

    table = (
        (
            r"time_text_embed\.timestep_embedder\.linear_[12]|transformer_blocks\.\d+\.(img|txt)_mod\.1"
            r"|norm_out\.linear",
            Site("modulation"),
        ),
        (r"txt_in|transformer_blocks\.\d+\.(attn\.(add_[qkv]_proj|to_add_out)|txt_mlp\.net\..+)", Site("text")),
        (
            r"img_in|proj_out|transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0)|img_mlp\.net\..+)",
            Site("image", level=1),
        ),
    )

    hides_padding = True

    def __init__(self, model: nn.Module, reference: bool = False, cells: int | None = None) -> None:
        super().__init__(model, reference, cells)
        config: Any = uncompiled(model).config
        if config["zero_cond_t"]:
            both = Site("modulation", "reference")
            self.sites = {name: both if _OF_EACH_TIME.fullmatch(name) else site for name, site in self.sites.items()}

    @property
    def unread(self) -> Collection[str]:
        """The text's own way through the last block, which ends there: the image reads its keys and values alone."""
        blocks: Any = uncompiled(self.model).get_submodule("transformer_blocks")
        last = rf"transformer_blocks\.{len(blocks) - 1}\.(attn\.(add_q_proj|to_add_out)|txt_mlp\..+)"
        return [name for name in self.sites if re.fullmatch(last, name)]

    @property
    def joint(self) -> Site:
        """Text before image, in attention alone: no layer sees both."""
        site = Site("text", "image", level=1)
        return site.with_references(self._cells) if self._reference else site

    def steer(self, modules: Mapping[str, nn.Module], state: ForwardState, undo: Journal) -> None:
        """As `JointBackbone.steer`; of several texts in one sequence, each begins at the first position."""
        super().steer(modules, state, undo)
        children: dict[str, Any] = uncompiled(self.model)._modules
        embedding = children["pos_embed"]
        undo.callback(children.__setitem__, "pos_embed", embedding)
        children["pos_embed"] = _EachTextFromItsStart(embedding, state)

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
            text: Hidden states of the text encoder. Shape: [rows, tokens, channels].
            added: "text_mask", True where tokens are not padding, if there is any. Shape: [rows, tokens].
            reference: Tokens of reference images, one after the other. Shape: [rows, tokens, channels].
            reference_grids: Height and width of each of them, in tokens.
            inputs: "attention_kwargs".
        """
        height, width = (side // PATCH for side in latents.shape[-2:])
        tokens = packed(latents)
        cells = tokens.shape[1]
        if reference is not None:
            tokens = torch.cat([tokens, reference.to(tokens.dtype)], dim=1)
        velocity = self.model(
            hidden_states=tokens,
            encoder_hidden_states=text,
            encoder_hidden_states_mask=(added or {}).get("text_mask"),
            timestep=t.expand(len(latents)).to(latents.dtype) / 1000,
            img_shapes=[[(1, *grid) for grid in ((height, width), *reference_grids)]] * len(latents),
            return_dict=False,
            **inputs,
        )[0]
        return unpacked(velocity[:, :cells], latents.shape[-2:])


class _EachTextFromItsStart(nn.Module):
    """diffusers' rotary embedding with the positions that tokens have in their own texts.

    diffusers counts through the whole sequence: the text of a region would stand behind that of the image.
    """

    def __init__(self, embedding: nn.Module, state: ForwardState) -> None:
        super().__init__()
        self.embedding, self.state = embedding, state

    def forward(self, *args: Any, max_txt_seq_len: int, **options: Any) -> tuple[Tensor, Tensor]:
        """The rotations of image and text. Shape: [cells or tokens, channels / 2] each, complex."""
        regions = self.state.inputs.joint_regions
        if regions is None:
            return self.embedding(*args, max_txt_seq_len=max_txt_seq_len, **options)
        image, text = self.embedding(*args, max_txt_seq_len=max(max_txt_seq_len, regions.reach), **options)
        return image, text[regions.positions]
