"""The UNets of Stable Diffusion 1.x, 2.x and SDXL: sites, grids, attention, and forward passes that stop early."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import Any, Literal, cast

from diffusers.models.attention_processor import Attention
from torch import Tensor, cat, nn

from lora_compose.attention.backbones.ip_adapter import read_images
from lora_compose.attention.backbones.processors import kernel_of, replace_processor
from lora_compose.attention.backbones.truncation import replace_children
from lora_compose.attention.claims import Journal, undoing
from lora_compose.attention.device import modules_of, uncompiled
from lora_compose.attention.forward_state import ForwardState
from lora_compose.attention.kernels import Kernel
from lora_compose.attention.lora_bank import outputs_of
from lora_compose.attention.sites import Site

Stage = Literal["down", "mid", "up"]


class UNetBackbone:
    """A `UNet2DConditionModel`."""

    unread = ()
    reads_regions = True
    joint = None
    has_group_norms = True
    unconditional_apart = False
    hides_padding = False

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        layout = _layout(model)
        self.sites = _sites(layout)
        self.levels = frozenset(site.level for site in self.sites.values())
        self._layers = _attention_layers(layout)

    @property
    def same_input(self) -> Sequence[tuple[str, ...]]:
        """Queries, keys and values of self-attention; keys and values of cross-attention."""
        return [
            tuple(f"{layer.name}.{side}" for side in ("to_q", "to_k", "to_v")[layer.cross :]) for layer in self._layers
        ]

    @cached_property
    def map_level(self) -> int:
        """The level whose attention maps show where concepts are."""
        return map_level(self._layers)

    @cached_property
    def map_layers(self) -> tuple[str, ...]:
        """The cross-attention layers on the map level."""
        return tuple(layer.name for layer in self._layers if layer.cross and layer.level == self.map_level)

    @property
    def word_layers(self) -> tuple[str, ...]:
        """The cross-attention layers on the map level: others have another grid."""
        return self.map_layers

    @cached_property
    def self_map_layers(self) -> tuple[str, ...]:
        """The self-attention layers on the map level."""
        return tuple(layer.name for layer in self._layers if not layer.cross and layer.level == self.map_level)

    @property
    def text_layers(self) -> int:
        """How many layers read the text; each may have a text of its own."""
        return sum(layer.cross for layer in self._layers)

    @property
    def native_side(self) -> int:
        """Side of the latents for which the model was made."""
        sample: Any = uncompiled(self.model).config["sample_size"]  # pyright: ignore[reportIndexIssue, reportArgumentType]
        return min((sample, sample) if isinstance(sample, int) else sample)

    def steer(self, modules: Mapping[str, nn.Module], state: ForwardState, undo: Journal) -> None:
        """Replaces every attention processor by ours, with the kernel found; `undo` puts them back.

        Raises:
            ValueError: For processors whose behaviour ours would lose; nothing has been changed then.
        """
        layers = {layer: cast(Attention, modules[layer.name]) for layer in self._layers}
        ours = {
            layer: ComposeAttnProcessor(layer, kernel_of(layer.name, attn), state, attn.processor)
            for layer, attn in layers.items()
        }
        for layer, attn in layers.items():
            replace_processor(attn, ours[layer], undo)

    def truncated_after(self, layers: Iterable[str]) -> AbstractContextManager[None]:
        """Inside this block the UNet stops after the last of some layers."""
        return stopped_after(self.model, layers)

    def forward(
        self,
        latents: Tensor,
        t: Tensor,
        text: Tensor,
        added: Mapping[str, Tensor] | None,
        channels: Tensor | None = None,
        image_embeds: Sequence[Tensor] | None = None,
        ip_adapter_masks: Sequence[Tensor] | None = None,
        several_texts: bool = False,
        **inputs: Any,
    ) -> Tensor:
        """As `Backbone.forward`.

        Args:
            added: Further inputs by row (SDXL's pooled text and sizes); "lengths" of texts are for attention only.
            channels: Further channels beside the latents: mask and masked image, for UNets made for inpainting. Shape:
                [rows, channels, height, width].
            image_embeds: The images of each IP-Adapter. Shape: [rows, images, ...] each.
            ip_adapter_masks: Where they act. Shape: [1, images, height, width] each.
        """
        conditions = {name: value for name, value in (added or {}).items() if name != "lengths"} or None
        if image_embeds is not None:
            conditions = {**(conditions or {}), "image_embeds": list(image_embeds)}
        if ip_adapter_masks is not None:
            given = inputs.get("cross_attention_kwargs") or {}
            inputs["cross_attention_kwargs"] = {**given, "ip_adapter_masks": list(ip_adapter_masks)}
        latents = latents if channels is None else cat([latents, channels], dim=1)
        text = text[0] if several_texts else text  # processors read the others from the state
        return self.model(
            latents, t, encoder_hidden_states=text, added_cond_kwargs=conditions, return_dict=False, **inputs
        )[0]


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer of a UNet.

    Attributes:
        name: Module name, for example "down_blocks.0.attentions.0.transformer_blocks.0.attn2".
        cross: True where keys and values come from the text.
        stage: Down, mid or up part of the UNet.
        level: Number of halvings of the latent grid at this layer.
        order: Number of layers of the same kind (self- or cross-attention) before it.
        of_kind: Number of layers of the same kind in all.
    """

    name: str
    cross: bool
    stage: Stage
    level: int
    order: int = 0
    of_kind: int = 1


Layout = tuple[tuple[str, bool | None], ...]
"""The names of all modules of a UNet, and of attention layers whether they are cross-attention.

What follows from it is computed once for each layout, since every call needs it.
"""


_BLOCK = re.compile(r"(down_blocks|up_blocks)\.\d+|mid_block")


def _layout(unet: nn.Module) -> Layout:
    return tuple(
        [
            (name, bool(module.is_cross_attention) if isinstance(module, Attention) else None)
            for name, module in modules_of(unet).items()
        ]
    )


def _blocks(layout: Layout) -> Iterator[tuple[str, Stage, int, Sequence[tuple[str, bool | None]]]]:
    """Name, stage, level and modules of every block, in the order in which the UNet runs them."""
    by_block: dict[str, list[tuple[str, bool | None]]] = {}
    for name, cross in layout:
        if match := _BLOCK.match(name):
            by_block.setdefault(match[0], []).append((name, cross))
    stages: Sequence[Stage] = ("down", "mid", "up")
    level = 0
    for stage in stages:
        for block, modules in by_block.items():
            if block.startswith(stage):
                yield block, stage, level, modules
                level += (f"{block}.downsamplers", None) in modules
                level -= (f"{block}.upsamplers", None) in modules


def blocks(unet: nn.Module) -> Iterator[tuple[str, nn.Module, Stage, int]]:
    """Name, module, stage and level of every block, in the order in which the UNet runs them."""
    for name, stage, level, _ in _blocks(_layout(unet)):
        yield name, uncompiled(unet).get_submodule(name), stage, level


@lru_cache(maxsize=8)
def _attention_layers(layout: Layout) -> tuple[AttentionLayer, ...]:
    """Every attention layer, in forward order (down, mid, up)."""
    layers = [
        AttentionLayer(name, cross, stage, level)
        for _, stage, level, modules in _blocks(layout)
        for name, cross in modules
        if cross is not None
    ]
    kinds = {cross: [layer for layer in layers if layer.cross == cross] for cross in (True, False)}
    order = {layer.name: (i, len(kind)) for kind in kinds.values() for i, layer in enumerate(kind)}
    return tuple(replace(layer, order=order[layer.name][0], of_kind=order[layer.name][1]) for layer in layers)


def map_level(layers: tuple[AttentionLayer, ...]) -> int:
    """The coarsest level with cross-attention in a down and an up block; raises ValueError if no level has both."""
    levels = [{layer.level for layer in layers if layer.cross and layer.stage == stage} for stage in ("down", "up")]
    if not levels[0] & levels[1]:
        raise ValueError("this UNet has no grid with cross-attention in both a down and an up block")
    return max(levels[0] & levels[1])


@lru_cache(maxsize=8)
def _sites(layout: Layout) -> Mapping[str, Site]:
    """The site of every layer that a LoRA may adapt, by name."""
    sites = {name: Site("row") for name, _ in layout if name.split(".")[0].endswith("_embedding")}
    sites |= {"conv_in": Site("image"), "conv_out": Site("image")}
    cross = [layer.name for layer in _attention_layers(layout) if layer.cross]
    text = {f"{name}.{side}" for name in cross for side in ("to_k", "to_v")}
    read = {f"{name}.to_out.0" for name in cross}
    for block, _, level, modules in _blocks(layout):
        for name, _ in modules:
            if name in text:
                sites[name] = Site("text")
            elif name in read:
                sites[name] = Site("image", level=level, reads_text=True)
            elif name.endswith("time_emb_proj"):
                sites[name] = Site("row")
            else:
                inner = name[len(block) + 1 :]
                sites[name] = Site(
                    "image", level=level + inner.startswith("downsamplers") - inner.startswith("upsamplers")
                )
    return MappingProxyType(sites)


@contextmanager
def stopped_after(unet: nn.Module, layers: Iterable[str]) -> Iterator[None]:
    """Inside this block the UNet stops after the up block with the last of some layers, or before all up blocks."""
    model: Any = uncompiled(unet)
    layers = tuple(layers)
    names = [f"up_blocks.{i}" for i in range(len(model.up_blocks))]
    needed = [i for i, name in enumerate(names, start=1) if any(layer.startswith(f"{name}.") for layer in layers)]
    keep = max(needed, default=0)
    up_blocks = list(model.up_blocks)
    with undoing(model) as undo:
        cut = {"up_blocks": nn.ModuleList(up_blocks[:keep]), "conv_norm_out": None, "conv_out": nn.Identity()}
        replace_children(model, undo, **cut)
        if keep:
            replace_children(up_blocks[keep - 1], undo, upsamplers=None)
        yield


class ComposeAttnProcessor:
    """Attention with cached text keys and values, regions and recording; it uses the replaced processor's kernel.

    LoRA deltas need no code here, since the projections are bank layers. What a pass needs is read from the state; the
    processor keeps nothing of a call.

    Args:
        replaced: diffusers' processor of the layer; those of IP-Adapters have projections for the images.
    """

    def __init__(self, layer: AttentionLayer, kernel: Kernel, state: ForwardState, replaced: Any = None) -> None:
        self._layer = layer
        self._kernel = kernel
        self._state = state
        self._replaced = replaced

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | tuple[Tensor, Sequence[Tensor]] | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        ip_adapter_masks: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Attends. The frame around the kernel follows diffusers' AttnProcessor2_0 (0.42).

        Args:
            hidden_states: Shape: [rows, cells, channels].
            encoder_hidden_states: The text; None for self-attention. Shape: [rows, tokens, channels], or [rows, tokens,
                layers * channels] with a text for each cross-attention layer, in forward order. With IP-Adapters, the
                text and their images.
            attention_mask: Not supported, must be None.
            temb: Unused, part of the interface.
            ip_adapter_masks: Where the images of IP-Adapters act.
        """
        if attention_mask is not None:
            raise ValueError("attention masks of the caller cannot be combined with concepts")
        residual = hidden_states
        given = encoder_hidden_states
        text, images = given if isinstance(given, tuple) else (given, ())
        query, key, value = (_split_heads(x, attn.heads) for x in self._projected(attn, hidden_states, text))
        layer = self._layer
        hidden_states = self._state.attend(
            self._kernel, layer.name, layer.level, query, key, value, attn.scale, layer.cross
        )
        hidden_states = hidden_states.transpose(1, 2).flatten(2).to(query.dtype)
        regions = self._state.inputs.regions
        for read in read_images(self._replaced, self._kernel, query, images, ip_adapter_masks) if images else ():
            hidden_states = hidden_states + (read if regions is None else regions.at_queries(layer.level, read))
        to_out: Any = attn.to_out
        project, dropout = to_out
        hidden_states = dropout(project(hidden_states))
        if not layer.cross:
            for recorder in self._state.recorders:
                recorder.take_output(layer.name, hidden_states)
        if layer.cross and regions is not None:
            hidden_states = regions.mean_over_queries(layer.level, hidden_states)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor

    def _projected(self, attn: Attention, hidden_states: Tensor, text: Tensor | None) -> Sequence[Tensor]:
        """Queries, keys and values."""
        keys_and_values: Any = attn.to_k, attn.to_v
        if text is None:
            return outputs_of((attn.to_q, *keys_and_values), hidden_states)
        inputs = self._state.inputs
        text = self._own(text if inputs.texts is None else inputs.texts, attn.cross_attention_dim)

        def project() -> tuple[Tensor, Tensor]:
            key, value = outputs_of(keys_and_values, attn.norm_encoder_hidden_states(text) if attn.norm_cross else text)
            return key, value

        kept = inputs.text_kv
        return attn.to_q(hidden_states), *(project() if kept is None else kept.get(self._layer.name, project))

    def _own(self, text: Tensor, width: int) -> Tensor:
        """The channels of the text that a layer reads, where the texts of all layers lie side by side."""
        if text.shape[-1] == width or text.shape[-1] != width * self._layer.of_kind:
            return text
        return text[..., self._layer.order * width : (self._layer.order + 1) * width]


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """[..., rows, positions, heads * channels] -> [..., rows, heads, positions, channels]."""
    return x.view(*x.shape[:-1], heads, -1).transpose(-3, -2)
