"""LoRA and LoCon: a product of two thin factors, or of three (`lora_mid`, a Tucker decomposition).

up @ down, at the scale alpha / rank, of rsLoRA alpha / sqrt(rank) (`alphas.py`). LoRA: arXiv 2106.09685.
"""

import math

import torch
from torch import Tensor

from lora_compose.attention.lora_bank import LoraFactors
from lora_compose.pipelines.formats.change import Change, check_finite, matrix
from lora_compose.pipelines.formats.kinds.kind import Kind, Shapes, Tensors, check_rank, columns, needed, rows


def _ending(side: str, letter: str) -> str:
    """PEFT has letters, and perhaps the adapter's name inside; attention processors and ED-LoRA have an underscore.

    Those of XLabs end with a number, which is of the layer's name.
    """
    peft = rf"\.lora_(?:{side}|(?:linear_)?layer\.{side}|{letter}(?:\.\w++)?)\.weight"
    return rf"{peft}|[._]lora\.{side}\.weight|(?<=_lora[12])\.{side}\.weight"


def _sides(shapes: Shapes) -> tuple[int, int]:
    down, up = needed(shapes, "down", "up")
    sides = rows(shapes, "up"), columns(shapes, "down")
    if up[1] != down[0] or not {len(down), len(up)} <= {2, 4} or math.prod(up[2:]) != 1 or 0 in (*down, *up):
        raise ValueError(f"factors of shape {list(down)} and {list(up)} do not fit each other")
    return sides


def _delta(tensors: Tensors) -> Tensor:
    down, up = tensors["down"], tensors["up"]
    return (matrix(up) @ matrix(down)).view(len(up), *down.shape[1:])


def _factors(tensors: Tensors, _max_rank: int = 0, _products: bool = False) -> Change:
    return Change(LoraFactors(tensors["down"], tensors["up"]))


def _tucker_sides(shapes: Shapes) -> tuple[int, int]:
    down, mid, up = needed(shapes, "down", "mid", "up")
    if len(down) not in (2, 4) or len(mid) != 4 or mid[1] != down[0] or 0 in down:
        raise ValueError(f"lora_mid of shape {list(mid)} does not fit lora_down of shape {list(down)}")
    if math.prod(down[2:]) != 1:
        raise ValueError(f"lora_down before a lora_mid has shape {list(down)}; expected a 1x1 convolution")
    if len(up) not in (2, 4) or up[1] != mid[0]:
        raise ValueError(f"lora_mid of shape {list(mid)} does not fit lora_up of shape {list(up)}")
    check_rank(max(mid[:2]), up[0], down[1])
    return up[0], down[1] * math.prod(mid[2:])


def _folded(tensors: Tensors) -> Tensors:
    """Two factors of three: a 1x1 convolution before a larger one is one larger convolution."""
    folded = torch.einsum("mnhw,ni->mihw", tensors["mid"].float(), tensors["down"].flatten(1).float())
    check_finite(folded)
    return {"down": folded, "up": tensors["up"]}


LOW_RANK = Kind(
    "LoRA", {"down": _ending("down", "A"), "up": _ending("up", "B")}, _sides, _delta, _factors, ranked=("down",)
)
TUCKER = Kind(
    "LoCon with a Tucker decomposition",
    {"mid": r"\.lora_mid\.weight"},
    _tucker_sides,
    lambda tensors: _delta(_folded(tensors)),
    lambda tensors, _max_rank, _products: _factors(_folded(tensors)),
    beside=("down", "up"),
    ranked=("down",),
)
