"""LoKr: the Kronecker product w1 (x) w2 (LyCORIS, arXiv 2309.14859).

Each is whole or w_a @ w_b; with a core t2, the second is a Tucker decomposition. Of two whole ones alpha has no effect:
LyCORIS writes one that has no meaning.
"""

import math

import torch
from torch import Tensor

from lora_compose.attention.lora_bank import LoraFactors
from lora_compose.pipelines.formats.change import Change, check_finite, leading, matrix, numerical_rank, shaped
from lora_compose.pipelines.formats.kinds.kind import Kind, Shapes, Tensors, check_rank
from lora_compose.pipelines.formats.kinds.tucker import tucker, tucker_sides


def _sides(shapes: Shapes) -> tuple[int, int]:
    (outputs, *inputs), (more_outputs, *more_inputs) = _half_sides(shapes, 1), _half_sides(shapes, 2)
    return outputs * more_outputs, math.prod(inputs) * math.prod(more_inputs)


def _half_sides(shapes: Shapes, number: int) -> tuple[int, ...]:
    """The sides of one half: outputs, inputs and perhaps the kernel."""
    name = f"lokr_w{number}"
    whole, up, down = shapes.get(name), shapes.get(f"{name}_a"), shapes.get(f"{name}_b")
    core = shapes.get("lokr_t2") if number == 2 else None
    if whole is not None and up is None and down is None and core is None:
        if len(whole) < 2:
            raise ValueError(f"a weight of shape {list(whole)} is not a matrix")
        return tuple(whole)
    if whole is not None or up is None or down is None or "lokr_t1" in shapes:
        raise ValueError(f"{', '.join(sorted(shapes))} are not a LoKr; the file is incomplete")
    if core is not None and len(up) == len(down) == 2:
        return tucker_sides(core, up, down)
    if len(up) != 2 or len(down) < 2 or up[1] != down[0]:
        raise ValueError(f"{name}_a and {name}_b have shapes {list(up)} and {list(down)}")
    check_rank(up[1], up[0], down[1])
    return up[0], *down[1:]


def _halves(tensors: Tensors) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Both halves as matrices, [outputs, inputs x kernel], and inputs and kernel of the product."""
    (first, inner), (second, outer) = _half(tensors, 1), _half(tensors, 2)
    return first, second, (math.prod(inner) * outer[0], *outer[1:])


def _half(tensors: Tensors, number: int) -> tuple[Tensor, torch.Size]:
    name = f"lokr_w{number}"
    if name in tensors:
        return matrix(tensors[name]), tensors[name].shape[1:]
    up, down = tensors[f"{name}_a"].float(), tensors[f"{name}_b"].float()
    if number == 2 and "lokr_t2" in tensors:
        up, down = tucker(tensors["lokr_t2"].float(), up, down)
    return up @ down.flatten(1), down.shape[1:]


def _delta(tensors: Tensors) -> Tensor:
    first, second, inputs = _halves(tensors)
    return torch.kron(first, second).view(-1, *inputs)


def _factors(tensors: Tensors, max_rank: int, products: bool) -> Change:
    """Factors by the singular values of both halves.

    Singular values of a Kronecker product are the products of those of its parts, and so are the vectors; the leading
    ones are products of leading ones.
    """
    if products and (product := _product(tensors, max_rank)) is not None:
        return product
    *halves, inputs = _halves(tensors)
    small, large = (half.double() for half in halves)
    (u1, s1, v1), (u2, s2, v2) = leading(small, max_rank), leading(large, max_rank)
    values = torch.outer(s1, s2).flatten()
    order = values.argsort(descending=True, stable=True)
    kept = order[: min(max_rank, numerical_rank(values[order]))]
    first, second = kept // len(s2), kept % len(s2)
    root = values[kept].sqrt()
    up = torch.einsum("or,pr->opr", u1[:, first], u2[:, second]).flatten(0, 1) * root
    down = torch.einsum("ri,rj->rij", v1[first], v2[second]).flatten(1) * root[:, None]
    whole = (small**2).sum() * (large**2).sum()
    lost = max(0.0, float(whole - (values[kept] ** 2).sum()))
    return shaped(up.float(), down.float(), lost, inputs)


def _product(tensors: Tensors, max_rank: int) -> Change | None:
    """A LoKr of matrices as the Kronecker product that it is; None if factors of a low rank do."""
    if any(tensor.ndim != 2 for tensor in tensors.values()):
        return None
    left, _ = _half(tensors, 1)
    if "lokr_w2" in tensors:
        whole = matrix(tensors["lokr_w2"])
        identity = torch.eye(min(whole.shape))
        up, down = (whole, identity) if whole.shape[0] >= whole.shape[1] else (identity, whole)
    else:
        up, down = tensors["lokr_w2_a"].float(), tensors["lokr_w2_b"].float()
    if min(left.shape) * len(down) <= max_rank:
        return None
    check_finite(left, up, down)
    return Change(LoraFactors(down.contiguous(), up.contiguous(), left=left.contiguous()))


LOKR = Kind(
    "LoKr",
    {f"lokr_{slot}": rf"\.lokr_{slot}" for slot in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t1", "t2")},
    _sides, _delta, _factors, ranked=("lokr_w2_b", "lokr_w1_b"),
)  # fmt: skip
