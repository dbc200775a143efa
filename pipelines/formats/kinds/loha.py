"""LoHa: (w1_a @ w1_b) * (w2_a @ w2_b), elementwise (FedPara, arXiv 2108.06098; LyCORIS, arXiv 2309.14859).

With cores t1 and t2, each half is a Tucker decomposition.
"""

import math

from torch import Tensor

from lora_compose.pipelines.formats.change import Change, cut_factors, shaped
from lora_compose.pipelines.formats.kinds.kind import Kind, Shapes, Tensors, check_rank, needed
from lora_compose.pipelines.formats.kinds.tucker import tucker, tucker_sides


def _sides(shapes: Shapes) -> tuple[int, int]:
    first, second = _half_sides(shapes, 1), _half_sides(shapes, 2)
    if first != second:
        raise ValueError("the two halves of the LoHa have different shapes")
    return first[0], math.prod(first[1:])


def _half_sides(shapes: Shapes, number: int) -> tuple[int, ...]:
    """The sides of one half: outputs, inputs and, with a core, the kernel."""
    up, down = needed(shapes, f"hada_w{number}_a", f"hada_w{number}_b")
    core = shapes.get(f"hada_t{number}")
    if len(up) != 2 or len(down) != 2 or (core is None and up[1] != down[0]):
        raise ValueError(f"the factors of the LoHa have shapes {list(up)} and {list(down)}; expected fitting matrices")
    if core is not None:
        return tucker_sides(core, up, down)
    check_rank(up[1], up[0], down[1])
    return up[0], down[1]


def _half(tensors: Tensors, number: int) -> tuple[Tensor, Tensor]:
    """The factors of one half. Shapes: [outputs, rank] and [rank, inputs, ...]."""
    up, down = (tensors[f"hada_w{number}_{side}"].float() for side in "ab")
    core = tensors.get(f"hada_t{number}")
    return (up, down) if core is None else tucker(core.float(), up, down)


def _delta(tensors: Tensors) -> Tensor:
    (up1, down1), (up2, down2) = _half(tensors, 1), _half(tensors, 2)
    return ((up1 @ down1.flatten(1)) * (up2 @ down2.flatten(1))).view(len(up1), *down1.shape[1:])


def _factors(tensors: Tensors, max_rank: int, _products: bool) -> Change | None:
    """Factors of rank r * r, from all pairs of columns and of rows of the two halves; None if that rank is too high."""
    (up1, down1), (up2, down2) = _half(tensors, 1), _half(tensors, 2)
    kernel, rank = down1.shape[1:], up1.shape[1] * up2.shape[1]
    if rank > min(len(up1), math.prod(kernel)):
        return None
    up = (up1[:, :, None] * up2[:, None, :]).flatten(1)
    down = (down1.flatten(1)[:, None, :] * down2.flatten(1)[None, :, :]).flatten(0, 1)
    return shaped(*((up, down, 0.0) if rank <= max_rank else cut_factors(up, down, max_rank)), kernel)


LOHA = Kind(
    "LoHa",
    {f"hada_{slot}": rf"\.hada_{slot}" for slot in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    _sides, _delta, _factors, ranked=("hada_w1_b",),
)  # fmt: skip
