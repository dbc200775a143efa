"""Qwen-Image: text and image in one sequence, in double-stream blocks alone; text has rotary positions of its own."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lora_compose.attention.backbones.joint import PATCH, JointBackbone, packed, unpacked
from lora_compose.attention.claims import Journal
from lora_compose.attention.device import uncompiled
from lora_compose.attention.forward_state import ForwardState
from lora_compose.attention.sites import Site


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

    @property
    def joint(self) -> Site:
        """Text before image, in attention alone: no layer sees both."""
        return Site("text", "image", level=1)

    def steer(self, modules: Mapping[str, nn.Module], state: ForwardState, undo: Journal) -> None:
        """As `JointBackbone.steer`; of several texts in one sequence, each begins at the first position."""
        super().steer(modules, state, undo)
        children: dict[str, Any] = uncompiled(self.model)._modules
        found = children["pos_embed"]
        undo.callback(children.__setitem__, "pos_embed", found)
        children["pos_embed"] = _EachTextFromItsStart(found, state)

    def forward(
        self, latents: Tensor, t: Tensor, text: Tensor, added: Mapping[str, Tensor] | None, **inputs: Any
    ) -> Tensor:
        """One forward pass.

        Args:
            latents: Shape: [rows, channels, height, width].
            t: The timestep, 0 to 1000.
            text: Hidden states of the text encoder. Shape: [rows, tokens, channels].
            added: "text_mask", True where tokens are not padding, if there is any. Shape: [rows, tokens].
            inputs: "attention_kwargs".

        Returns:
            The velocity. Shape: as the latents.
        """
        height, width = (side // PATCH for side in latents.shape[-2:])
        velocity = self.model(
            hidden_states=packed(latents),
            encoder_hidden_states=text,
            encoder_hidden_states_mask=(added or {}).get("text_mask"),
            timestep=t.expand(len(latents)).to(latents.dtype) / 1000,
            img_shapes=[[(1, height, width)]] * len(latents),
            return_dict=False,
            **inputs,
        )[0]
        return unpacked(velocity, latents.shape[-2:])


class _EachTextFromItsStart(nn.Module):
    """diffusers' rotary embedding with the positions that tokens have in their own texts.

    diffusers counts through the whole sequence: the text of a region would stand behind that of the image.
    """

    def __init__(self, found: nn.Module, state: ForwardState) -> None:
        super().__init__()
        self.found, self.state = found, state

    def forward(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """The rotations of image and text. Shape: [cells or tokens, channels / 2] each, complex."""
        image, text = self.found(*args, **options)
        regions = self.state.inputs.joint_regions
        return image, text if regions is None else text[regions.positions]
