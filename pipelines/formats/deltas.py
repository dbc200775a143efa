"""The tensors of one layer -> low-rank factors of the change they make, exactly or with a known error.

The bank needs factors, `scale * up @ down`, since gates act between the two. Plain LoRA and LoCon are factors already.
Other adapters reach a higher rank with as many parameters (LyCORIS, arXiv 2309.14859): products of their parts are
rewritten as factors, and where those have more rank than wanted, the best approximation of that rank is taken
(Eckart-Young).

Small tensors can have a huge product, and files are not trusted. `size` computes the size of a change from shapes
alone, so that nothing is multiplied that does not fit the layer.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_compose.attention.lora_bank import LoraFactors

MAX_RANK = 128
"""Changes of adapters other than LoRA are kept exactly up to this rank."""

_TINY = 1e-6
"""Singular values below this share of the largest are rounding."""


@dataclass(frozen=True, eq=False)
class Change:
    """A layer's change as factors.

    Attributes:
        factors: The low-rank factors.
        lost: Squared Frobenius norm of the part that the factors leave out; 0 if they are exact.
    """

    factors: LoraFactors
    lost: float = 0.0


def inner(one: LoraFactors, other: LoraFactors) -> float:
    """The Frobenius inner product of two changes of one layer, without building either.

    tr((B1 A1)^T B2 A2) = sum((B1^T B2) * (A1 A2^T)).
    """
    if one.left is not None or other.left is not None:
        return _inner_of_products(one, other)
    ups = one.up.flatten(1).double().T @ other.up.flatten(1).double()
    downs = one.down.flatten(1).double() @ other.down.flatten(1).double().T
    return float((ups * downs).sum()) * one.scale * other.scale


def _inner_of_products(one: LoraFactors, other: LoraFactors) -> float:
    """<K1 (x) D1, K2 (x) D2> = <K1, K2> <D1, D2>, of products of equal shapes."""
    if one.left is None or other.left is None or one.left.shape != other.left.shape:
        return float((one.delta().double() * other.delta().double()).sum())
    return float((one.left.double() * other.left.double()).sum()) * inner(
        replace(one, left=None), replace(other, left=None)
    )


def rank_of(slots: Mapping[str, Tensor]) -> int | None:
    """The rank that divides a layer's alpha; None if alpha has no effect and the scale is 1.

    Raises:
        ValueError: If tensors are missing or have too few dimensions to tell.
    """
    if "down" in slots:
        return _side(slots, "down")
    if "hada_w1_b" in slots:
        return _side(slots, "hada_w1_b")
    for name in ("lokr_w2_b", "lokr_w1_b"):
        if name in slots:
            return _side(slots, name)
    return None


def size(slots: Mapping[str, Tensor]) -> tuple[int, int]:
    """Outputs and inputs (times the cells of the kernel) of a layer's change, from the shapes of its tensors alone.

    Raises:
        ValueError: If tensors are missing, are too many, do not fit each other, or have more rank than sides.
    """
    names = set(slots)
    if names == {"down", "up"}:
        return _side(slots, "up"), _inputs(slots, "down")
    if names == {"down", "mid", "up"}:
        return _locon_size(slots)
    if names == {"diff"}:
        return _side(slots, "diff"), _inputs(slots, "diff")
    if any(name.startswith("hada_") for name in names):
        return _loha_size(slots)
    if any(name.startswith("lokr_") for name in names):
        (outputs, inputs), (more_outputs, more_inputs) = _lokr_half_size(slots, 1), _lokr_half_size(slots, 2)
        return outputs * more_outputs, inputs * more_inputs
    if names & {"down", "up"}:
        raise ValueError(f"it has only one of its two factors ({', '.join(sorted(names))}); the file is incomplete")
    raise ValueError(f"{', '.join(sorted(names))} is not enough to compute the change; the file is incomplete")


def change(slots: Mapping[str, Tensor], scale: float, max_rank: int = MAX_RANK, *, products: bool = False) -> Change:
    """The change of one layer as factors.

    Args:
        slots: The layer's tensors: "down" and "up", with "mid" for a Tucker decomposition; "hada_*" (LoHa); "lokr_*"
            (LoKr); or "diff", a whole difference. May build a product as large as `size` says; compare that with the
            layer first.
        scale: Factor on the change.
        max_rank: Changes of other adapters are kept exactly up to this rank, and cut to it beyond.
        products: Whether a LoKr of more rank may stay a Kronecker product, which is exact.

    Raises:
        ValueError: As for `size`, and if the numbers are too large.
    """
    size(slots)
    if "diff" in slots:
        return _shaped(*_cut(_wide(slots["diff"]), max_rank), slots["diff"].shape[1:], 1.0)
    if "mid" in slots:
        return Change(LoraFactors(_folded(slots["down"], slots["mid"]), slots["up"], scale))
    if "down" in slots:
        return Change(LoraFactors(slots["down"], slots["up"], scale))
    if "hada_w1_a" in slots:
        return _loha(slots, scale, max_rank)
    return (_product(slots, scale, max_rank) if products else None) or _lokr(slots, scale, max_rank)


def _side(slots: Mapping[str, Tensor], name: str) -> int:
    if slots[name].ndim < 2:
        raise ValueError(f"{name} has shape {list(slots[name].shape)}; expected a matrix")
    return slots[name].shape[0]


def _inputs(slots: Mapping[str, Tensor], name: str) -> int:
    _side(slots, name)
    return math.prod(slots[name].shape[1:])


def _check_rank(rank: int, outputs: int, inputs: int) -> None:
    """Bounds the rank: the cost of a product grows with it, and a layer with one tiny side would not limit it."""
    limit = max(outputs, inputs, MAX_RANK)
    if rank > limit:
        raise ValueError(f"its factors have rank {rank}, more than the {limit} that a change of this size can need")


def _wide(tensor: Tensor) -> Tensor:
    """As a matrix of outputs and inputs, in fp32 at least."""
    return tensor.flatten(1).to(torch.promote_types(tensor.dtype, torch.float32))


def _locon_size(slots: Mapping[str, Tensor]) -> tuple[int, int]:
    down, mid, up = slots["down"], slots["mid"], slots["up"]
    if down.ndim not in (2, 4) or mid.ndim != 4 or mid.shape[1] != down.shape[0] or down.flatten(1).numel() == 0:
        raise ValueError(f"lora_mid of shape {list(mid.shape)} does not fit lora_down of shape {list(down.shape)}")
    if down.ndim == 4 and down.shape[2:] != (1, 1):
        raise ValueError(f"lora_down before a lora_mid has shape {list(down.shape)}; expected a 1x1 convolution")
    if up.ndim not in (2, 4) or up.shape[1] != mid.shape[0]:
        raise ValueError(f"lora_mid of shape {list(mid.shape)} does not fit lora_up of shape {list(up.shape)}")
    outputs, inputs = up.shape[0], down.shape[1]
    _check_rank(max(mid.shape[:2]), outputs, inputs)
    return outputs, inputs * math.prod(mid.shape[2:])


def _folded(down: Tensor, mid: Tensor) -> Tensor:
    """LoCon's three factors as two: a 1x1 convolution before a larger one is one larger convolution."""
    folded = torch.einsum("mnhw,ni->mihw", mid.float(), down.flatten(1).float())
    if not torch.isfinite(folded).all():
        raise ValueError("its numbers are too large to be multiplied")
    return folded


def _loha_size(slots: Mapping[str, Tensor]) -> tuple[int, int]:
    one, other = _loha_half_sides(slots, 1), _loha_half_sides(slots, 2)
    if one != other:
        raise ValueError("the two halves of the LoHa have different shapes")
    return one[0], math.prod(one[1:])


def _loha_half_sides(slots: Mapping[str, Tensor], number: int) -> tuple[int, ...]:
    """Outputs, inputs and, with a core, the kernel of one half."""
    allowed = {f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")}
    core = slots.get(f"hada_t{number}")
    try:
        up, down = (slots[f"hada_w{number}_{side}"] for side in "ab")
    except KeyError as error:
        raise ValueError(f"the LoHa has no {error}; the file is incomplete") from error
    if set(slots) - allowed or up.ndim != 2 or down.ndim != 2:
        raise ValueError(f"{', '.join(sorted(slots))} with matrices of {up.ndim} and {down.ndim} sides are not a LoHa")
    if core is not None:
        return _tucker_sides(core, up, down)
    if up.shape[1] != down.shape[0]:
        raise ValueError(f"the factors of the LoHa have shapes {list(up.shape)} and {list(down.shape)}")
    _check_rank(up.shape[1], up.shape[0], down.shape[1])
    return up.shape[0], down.shape[1]


def _loha(slots: Mapping[str, Tensor], scale: float, max_rank: int) -> Change:
    """(w1_a w1_b) * (w2_a w2_b), elementwise (FedPara, arXiv 2108.06098).

    The elementwise product of two products of rank r is one of rank r * r, whose factors are the products of all pairs
    of columns, and of all pairs of rows.
    """
    (up1, down1), (up2, down2) = _loha_half(slots, 1), _loha_half(slots, 2)
    kernel = _loha_half_sides(slots, 1)[1:]
    rank = up1.shape[1] * up2.shape[1]
    if rank > min(up1.shape[0], down1.shape[1]):
        return _shaped(*_cut((up1 @ down1) * (up2 @ down2), max_rank), kernel, scale)
    up = (up1[:, :, None] * up2[:, None, :]).flatten(1)
    down = (down1[:, None, :] * down2[None, :, :]).flatten(0, 1)
    kept = (up, down, 0.0) if rank <= max_rank else _cut_factors(up, down, max_rank)
    return _shaped(*kept, kernel, scale)


def _loha_half(slots: Mapping[str, Tensor], number: int) -> tuple[Tensor, Tensor]:
    """Factors of one half: [outputs, rank], [rank, inputs x kernel]."""
    up, down = (slots[f"hada_w{number}_{side}"].float() for side in "ab")
    core = slots.get(f"hada_t{number}")
    if core is not None:
        up, down = _tucker(core.float(), up, down)
    return up, down.flatten(1)


def _tucker_sides(core: Tensor, up: Tensor, down: Tensor) -> tuple[int, ...]:
    """Outputs, inputs, height and width of LyCORIS' Tucker decomposition."""
    if core.ndim != 4 or core.shape[0] != up.shape[0] or core.shape[1] != down.shape[0]:
        raise ValueError(f"a core of shape {list(core.shape)} fits no factors {list(up.shape)} and {list(down.shape)}")
    _check_rank(max(core.shape[:2]), up.shape[1], down.shape[1])
    return up.shape[1], down.shape[1], *core.shape[2:]


def _tucker(core: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """LyCORIS' Tucker decomposition as two factors: [outputs, rank] and [rank, inputs, height, width]."""
    return up.T, torch.einsum("ijhw,jr->irhw", core, down)


def _lokr_half_size(slots: Mapping[str, Tensor], number: int) -> tuple[int, int]:
    outputs, *inputs = _lokr_half_sides(slots, number)
    return outputs, math.prod(inputs)


def _lokr_half_sides(slots: Mapping[str, Tensor], number: int) -> tuple[int, ...]:
    """Outputs, inputs and perhaps the kernel of one half."""
    name = f"lokr_w{number}"
    whole, up, down = slots.get(name), slots.get(f"{name}_a"), slots.get(f"{name}_b")
    core = slots.get("lokr_t2") if number == 2 else None
    if whole is not None and up is None and down is None and core is None:
        if whole.ndim < 2:
            raise ValueError(f"a weight of shape {list(whole.shape)} is not a matrix")
        return tuple(whole.shape)
    if whole is not None or up is None or down is None or "lokr_t1" in slots:
        raise ValueError(f"{', '.join(sorted(slots))} are not a LoKr; the file is incomplete")
    if core is not None and up.ndim == down.ndim == 2:
        return _tucker_sides(core, up, down)
    if up.ndim != 2 or down.ndim < 2 or up.shape[1] != down.shape[0]:
        raise ValueError(f"{name}_a and {name}_b have shapes {list(up.shape)} and {list(down.shape)}")
    _check_rank(up.shape[1], up.shape[0], down.shape[1])
    return up.shape[0], *down.shape[1:]


def _lokr(slots: Mapping[str, Tensor], scale: float, max_rank: int) -> Change:
    """The Kronecker product of two matrices, each whole or in factors (LyCORIS' LoKr).

    Singular values of a Kronecker product are the products of those of its parts, and so are the vectors. The leading
    ones are products of leading ones.
    """
    small, large = (_lokr_half(slots, number).double() for number in (1, 2))
    (u1, s1, v1), (u2, s2, v2) = _leading(small, max_rank), _leading(large, max_rank)
    values = torch.outer(s1, s2).flatten()
    order = values.argsort(descending=True, stable=True)
    kept = order[: min(max_rank, _numerical_rank(values[order]))]
    first, second = kept // len(s2), kept % len(s2)
    root = values[kept].sqrt()
    up = torch.einsum("or,pr->opr", u1[:, first], u2[:, second]).flatten(0, 1) * root
    down = torch.einsum("ri,rj->rij", v1[first], v2[second]).flatten(1) * root[:, None]
    whole = (small**2).sum() * (large**2).sum()
    lost = max(0.0, float(whole - (values[kept] ** 2).sum()))
    (_, *inner), (_, *outer) = _lokr_half_sides(slots, 1), _lokr_half_sides(slots, 2)
    inputs = (math.prod(inner) * outer[0], *outer[1:])
    return _shaped(up.float(), down.float(), lost, inputs, scale)


def _product(slots: Mapping[str, Tensor], scale: float, max_rank: int) -> Change | None:
    """A LoKr of matrices as the Kronecker product that it is; None if factors of a low rank do."""
    if "lokr_t2" in slots or any(len(_lokr_half_sides(slots, number)) != 2 for number in (1, 2)):
        return None
    left = _lokr_half(slots, 1)
    if "lokr_w2" in slots:
        whole = _wide(slots["lokr_w2"])
        one = torch.eye(min(whole.shape))
        up, down = (whole, one) if whole.shape[0] >= whole.shape[1] else (one, whole)
    else:
        up, down = slots["lokr_w2_a"].float(), slots["lokr_w2_b"].float()
    if min(left.shape) * len(down) <= max_rank:
        return None
    if not all(torch.isfinite(tensor).all() for tensor in (left, up, down)):
        raise ValueError("its numbers are too large to be multiplied")
    return Change(LoraFactors(down.contiguous(), up.contiguous(), scale, left.contiguous()))


def _lokr_half(slots: Mapping[str, Tensor], number: int) -> Tensor:
    """One half as a matrix: outputs, inputs x kernel."""
    name = f"lokr_w{number}"
    if name in slots:
        return _wide(slots[name])
    up, down = slots[f"{name}_a"].float(), slots[f"{name}_b"].float()
    core = slots.get("lokr_t2") if number == 2 else None
    if core is not None:
        up, down = _tucker(core.float(), up, down)
    return up @ down.flatten(1)


def _cut(matrix: Tensor, max_rank: int) -> tuple[Tensor, Tensor, float]:
    """The best factors of at most a rank, and the squared norm of the part that they leave out."""
    u, s, v = _leading(matrix, max_rank)
    rank = min(max_rank, _numerical_rank(s))
    root = s[:rank].sqrt()
    up, down = u[:, :rank] * root, root[:, None] * v[:rank]
    return up, down, float(((matrix - up @ down).double() ** 2).sum())


def _cut_factors(up: Tensor, down: Tensor, max_rank: int) -> tuple[Tensor, Tensor, float]:
    """As `_cut` for the product of two factors, which is not built."""
    left, right = torch.linalg.qr(up.double()), torch.linalg.qr(down.double().T)
    u, s, v = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    rank = min(max_rank, _numerical_rank(s))
    root = s[:rank].sqrt()
    up, down = (left.Q @ u[:, :rank]) * root, root[:, None] * (v[:rank] @ right.Q.T)
    return up.float(), down.float(), float((s[rank:] ** 2).sum())


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The singular vectors and values; of large matrices only the leading ones (Halko et al., arXiv 0909.4061)."""
    few = rank + 16
    if min(matrix.shape) <= 3 * few:
        return torch.linalg.svd(matrix, full_matrices=False)
    generator = torch.Generator().manual_seed(0)
    span = torch.randn(matrix.shape[1], few, generator=generator, dtype=matrix.dtype)
    for _ in range(4):
        span = matrix.T @ torch.linalg.qr(matrix @ span).Q
        span = torch.linalg.qr(span).Q
    basis = torch.linalg.qr(matrix @ span).Q
    u, s, v = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u, s, v


def _numerical_rank(values: Tensor) -> int:
    """Number of sorted singular values above rounding; at least 1, since factors need a rank."""
    return max(1, int((values > values[0] * _TINY).sum())) if len(values) else 1


def _shaped(up: Tensor, down: Tensor, lost: float, inputs: tuple[int, ...], scale: float) -> Change:
    """Factors in the shape of their layer: convolutions have a kernel."""
    if not (torch.isfinite(up).all() and torch.isfinite(down).all() and math.isfinite(lost)):
        raise ValueError("its numbers are too large to be multiplied")
    if len(inputs) == 3:
        down, up = down.view(-1, *inputs), up[:, :, None, None]
    elif len(inputs) != 1:
        raise ValueError(f"a weight with inputs of shape {list(inputs)} is neither a matrix nor a convolution")
    factors = LoraFactors(down.contiguous(), up.contiguous(), scale)
    return Change(factors, lost * scale**2)
