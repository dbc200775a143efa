"""The layers of a UNet by name: what their inputs are, in forward order, and on which grid they work."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

Grid = tuple[int, int]
"""Height and width of a grid of latent cells."""

Stage = Literal["down", "mid", "up"]

Kind = Literal["text", "image", "row"]
"""What a layer sees: text tokens (keys and values of cross-attention), image cells, or one vector per batch row."""


@dataclass(frozen=True)
class Place:
    """Where a layer stands.

    Attributes:
        kind: What the layer sees.
        level: How often the latent grid has been halved where the layer's output lives; 0 for "text" and "row".
        reads: True for the output of cross-attention, which sees what image cells have read from the text.
    """

    kind: Kind
    level: int
    reads: bool = False


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer of a UNet.

    Attributes:
        name: Module name, for example "down_blocks.0.attentions.0.transformer_blocks.0.attn2".
        cross: True where keys and values come from the text.
        stage: The part of the UNet that holds it.
        level: How often the latent grid has been halved where it works.
        order: How many layers of its kind, self- or cross-attention, come before it.
        peers: How many layers of its kind there are.
    """

    name: str
    cross: bool
    stage: Stage
    level: int
    order: int = 0
    peers: int = 1


def grid_at(latent_grid: Grid, level: int) -> Grid:
    """The grid after `level` halvings, rounded up as the UNet's strided convolutions do."""
    height, width = latent_grid
    for _ in range(level):
        height, width = (height + 1) // 2, (width + 1) // 2
    return height, width


def coarser(cells: slice, level: int) -> slice:
    """The same part of a line after `level` halvings, rounded up at its end."""
    return slice(cells.start >> level, -(-cells.stop >> level))


def sent(tensor: Tensor, device: torch.device | None) -> Tensor:
    """A tensor on a device; the host does not wait for the copy.

    That is safe from ordinary memory on CUDA, which takes the numbers over at once, but not on MPS.
    """
    return tensor.to(device, non_blocking=device is not None and device.type != "mps")


def uncompiled(model: nn.Module) -> nn.Module:
    """The model inside the wrapper that `torch.compile(model)` returns, or the model itself."""
    return getattr(model, "_orig_mod", model)


def blocks(unet: nn.Module) -> Iterator[tuple[str, nn.Module, Stage, int]]:
    """Name, module, stage and level of every block, in the order in which the UNet runs them."""
    level = 0
    for i, block in enumerate(unet.get_submodule("down_blocks").children()):
        yield f"down_blocks.{i}", block, "down", level
        level += getattr(block, "downsamplers", None) is not None
    if getattr(unet, "mid_block", None) is not None:
        yield "mid_block", unet.get_submodule("mid_block"), "mid", level
    for i, block in enumerate(unet.get_submodule("up_blocks").children()):
        yield f"up_blocks.{i}", block, "up", level
        level -= getattr(block, "upsamplers", None) is not None


def attention_layers(unet: nn.Module) -> tuple[AttentionLayer, ...]:
    """Every attention layer of the UNet, in forward order (down, mid, up)."""
    found = [
        AttentionLayer(f"{block_name}.{name}", bool(module.is_cross_attention), stage, level)
        for block_name, block, stage, level in blocks(unet)
        for name, module in block.named_modules()
        if isinstance(module, Attention)
    ]
    kinds = {cross: [layer for layer in found if layer.cross == cross] for cross in (True, False)}
    order = {layer.name: (i, len(kind)) for kind in kinds.values() for i, layer in enumerate(kind)}
    return tuple(replace(layer, order=order[layer.name][0], peers=order[layer.name][1]) for layer in found)


def map_level(layers: tuple[AttentionLayer, ...]) -> int:
    """The level of the map grid: the coarsest one with cross-attention in a down and in an up block.

    Raises:
        ValueError: If no level has both.
    """
    levels = [{layer.level for layer in layers if layer.cross and layer.stage == stage} for stage in ("down", "up")]
    if not levels[0] & levels[1]:
        raise ValueError("this UNet has no grid with cross-attention in both a down and an up block")
    return max(levels[0] & levels[1])


def places(unet: nn.Module) -> Mapping[str, Place]:
    """The place of every module of the UNet that a LoRA may adapt, by module name.

    Names that are not in the result belong to no module of the UNet.
    """
    unet = uncompiled(unet)
    found = {name: Place("row", 0) for name, _ in unet.named_modules() if name.split(".")[0].endswith("_embedding")}
    found |= {"conv_in": Place("image", 0), "conv_out": Place("image", 0)}
    cross = [layer.name for layer in attention_layers(unet) if layer.cross]
    text = {f"{name}.{side}" for name in cross for side in ("to_k", "to_v")}
    read = {f"{name}.to_out.0" for name in cross}
    for block_name, block, _, level in blocks(unet):
        for inner, _ in block.named_modules():
            name = f"{block_name}.{inner}"
            if name in text:
                found[name] = Place("text", 0)
            elif name in read:
                found[name] = Place("image", level, reads=True)
            elif name.endswith("time_emb_proj"):
                found[name] = Place("row", 0)
            else:
                found[name] = Place("image", level + inner.startswith("downsamplers") - inner.startswith("upsamplers"))
    return found
