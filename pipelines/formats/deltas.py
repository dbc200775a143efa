"""The tensors of one layer -> low-rank factors of the change they make: exactly, or with an error that is known.

The bank needs factors, `scale * up @ down`, since gates act between the two. Plain LoRA and LoCon are factors already.
The others have more rank than parameters (LyCORIS, arXiv 2309.14859): products of their parts are rewritten as factors,
and where those have more rank than wanted, the best approximation of that rank is taken (Eckart-Young).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attention.lora_bank import LoraFactors

MAX_RANK = 128
"""The rank up to which changes of other kinds than LoRA are kept exactly."""

_TINY = 1e-6
"""Singular values below this share of the largest are rounding."""


@dataclass(frozen=True, eq=False)
class Change:
    """A layer's change as factors.

    Attributes:
        factors: What is applied.
        lost: Squared Frobenius norm of what the factors leave out; 0 where they are exact.
    """

    factors: LoraFactors
    lost: float = 0.0


def inner(one: LoraFactors, other: LoraFactors) -> float:
    """The Frobenius inner product of two changes of one layer, without building either.

    tr((B1 A1)^T B2 A2) = sum((B1^T B2) * (A1 A2^T)).
    """
    ups = one.up.flatten(1).double().T @ other.up.flatten(1).double()
    downs = one.down.flatten(1).double() @ other.down.flatten(1).double().T
    return float((ups * downs).sum()) * one.scale * other.scale


def rank_of(slots: Mapping[str, Tensor]) -> int | None:
    """The rank by which a layer's alpha is divided; None where alpha does not count: there the scale is 1.

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


def change(slots: Mapping[str, Tensor], scale: float, max_rank: int = MAX_RANK) -> Change:
    """What the tensors of one layer change.

    Args:
        slots: The layer's tensors: "down" and "up", with "mid" for a Tucker decomposition; "hada_*" (LoHa); "lokr_*"
            (LoKr); or "diff", a whole difference.
        scale: Factor on the whole.
        max_rank: Changes that are no factors yet are kept exactly up to this rank, and cut to it beyond.

    Raises:
        ValueError: If tensors are missing, are too many, or do not fit each other.
    """
    names = set(slots)
    if names == {"down", "up"}:
        return Change(LoraFactors(slots["down"], slots["up"], scale))
    if names == {"down", "mid", "up"}:
        return Change(LoraFactors(_folded(slots["down"], slots["mid"]), slots["up"], scale))
    if names == {"diff"}:
        return _shaped(*_cut(_wide(slots["diff"]), max_rank), slots["diff"].shape[1:], 1.0)
    if any(name.startswith("hada_") for name in names):
        return _loha(slots, scale, max_rank)
    if any(name.startswith("lokr_") for name in names):
        return _lokr(slots, scale, max_rank)
    if names & {"down", "up"}:
        raise ValueError(f"it has only one of its two factors ({', '.join(sorted(names))}); the file is incomplete")
    raise ValueError(f"{', '.join(sorted(names))} is not enough to know the change; the file is incomplete")


def _side(slots: Mapping[str, Tensor], name: str) -> int:
    if slots[name].ndim < 2:
        raise ValueError(f"{name} has shape {list(slots[name].shape)}; expected a matrix")
    return slots[name].shape[0]


def _wide(tensor: Tensor) -> Tensor:
    """As a matrix of outputs and inputs, in fp32 at least."""
    if tensor.ndim < 2:
        raise ValueError(f"a weight of shape {list(tensor.shape)} is no matrix")
    return tensor.flatten(1).to(torch.promote_types(tensor.dtype, torch.float32))


def _folded(down: Tensor, mid: Tensor) -> Tensor:
    """LoCon's three factors as two: a 1x1 convolution before a larger one is one larger convolution."""
    if down.ndim not in (2, 4) or mid.ndim != 4 or mid.shape[1] != down.shape[0] or down.flatten(1).numel() == 0:
        raise ValueError(f"lora_mid of shape {list(mid.shape)} does not fit lora_down of shape {list(down.shape)}")
    if down.ndim == 4 and down.shape[2:] != (1, 1):
        raise ValueError(f"lora_down before a lora_mid has shape {list(down.shape)}; expected a 1x1 convolution")
    folded = torch.einsum("mnhw,ni->mihw", mid.float(), down.flatten(1).float())
    if not torch.isfinite(folded).all():
        raise ValueError("its numbers are too large to be multiplied")
    return folded


def _loha(slots: Mapping[str, Tensor], scale: float, max_rank: int) -> Change:
    """(w1_a w1_b) * (w2_a w2_b), elementwise (FedPara, arXiv 2108.06098).

    The elementwise product of two products of rank r is one of rank r * r, whose factors are the products of all pairs
    of columns, and of all pairs of rows.
    """
    one, other = _loha_half(slots, 1), _loha_half(slots, 2)
    (up1, down1, kernel), (up2, down2, same) = one, other
    if kernel != same or up1.shape[0] != up2.shape[0] or down1.shape[1] != down2.shape[1]:
        raise ValueError("the two halves of the LoHa have different shapes")
    rank = up1.shape[1] * up2.shape[1]
    if rank <= min(max_rank, up1.shape[0], down1.shape[1]):
        up = (up1[:, :, None] * up2[:, None, :]).flatten(1)
        down = (down1[:, None, :] * down2[None, :, :]).flatten(0, 1)
        return _shaped(up, down, 0.0, kernel, scale)
    return _shaped(*_cut((up1 @ down1) * (up2 @ down2), max_rank), kernel, scale)


def _loha_half(slots: Mapping[str, Tensor], number: int) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Factors of one half: [outputs, rank], [rank, inputs x kernel], and the kernel with the inputs."""
    allowed = {f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")}
    core = slots.get(f"hada_t{number}")
    try:
        up, down = (slots[f"hada_w{number}_{side}"].float() for side in "ab")
    except KeyError as error:
        raise ValueError(f"the LoHa has no {error}; the file is incomplete") from error
    if set(slots) - allowed or up.ndim != 2 or down.ndim != 2:
        raise ValueError(f"{', '.join(sorted(slots))} with matrices of {up.ndim} and {down.ndim} sides are no LoHa")
    if core is None:
        if up.shape[1] != down.shape[0]:
            raise ValueError(f"the factors of the LoHa have shapes {list(up.shape)} and {list(down.shape)}")
        return up, down, (down.shape[1],)
    up, down = _tucker(core.float(), up, down)
    return up, down.flatten(1), tuple(down.shape[1:])


def _tucker(core: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """LyCORIS' Tucker decomposition as two factors: [outputs, rank] and [rank, inputs, height, width]."""
    if core.ndim != 4 or core.shape[0] != up.shape[0] or core.shape[1] != down.shape[0]:
        raise ValueError(f"a core of shape {list(core.shape)} fits no factors {list(up.shape)} and {list(down.shape)}")
    return up.T, torch.einsum("ijhw,jr->irhw", core, down)


def _lokr(slots: Mapping[str, Tensor], scale: float, max_rank: int) -> Change:
    """The Kronecker product of two matrices, each whole or in factors (LyCORIS' LoKr).

    Singular values of a Kronecker product are the products of those of its parts, and so are the vectors.
    """
    small, _ = _lokr_half(slots, 1)
    large, kernel = _lokr_half(slots, 2)
    (u1, s1, v1), (u2, s2, v2) = (torch.linalg.svd(half.double(), full_matrices=False) for half in (small, large))
    values = torch.outer(s1, s2).flatten()
    order = values.argsort(descending=True, stable=True)
    kept = order[: min(max_rank, _numerical_rank(values[order]))]
    first, second = kept // len(s2), kept % len(s2)
    root = values[kept].sqrt()
    up = torch.einsum("or,pr->opr", u1[:, first], u2[:, second]).flatten(0, 1) * root
    down = torch.einsum("ri,rj->rij", v1[first], v2[second]).flatten(1) * root[:, None]
    lost = float((values[order[len(kept) :]] ** 2).sum())
    inputs = (small.shape[1] * kernel[0], *kernel[1:])
    return _shaped(up.float(), down.float(), lost, inputs, scale)


def _lokr_half(slots: Mapping[str, Tensor], number: int) -> tuple[Tensor, tuple[int, ...]]:
    """One half as a matrix, and the sides of its inputs with the kernel."""
    name = f"lokr_w{number}"
    whole, up, down = slots.get(name), slots.get(f"{name}_a"), slots.get(f"{name}_b")
    core = slots.get("lokr_t2") if number == 2 else None
    if whole is not None and up is None and down is None and core is None:
        return _wide(whole), tuple(whole.shape[1:])
    if whole is not None or up is None or down is None or "lokr_t1" in slots:
        raise ValueError(f"{', '.join(sorted(slots))} are no LoKr; the file is incomplete")
    if core is not None and up.ndim == down.ndim == 2:
        up, down = _tucker(core.float(), up.float(), down.float())
    if up.ndim != 2 or down.ndim < 2 or up.shape[1] != down.shape[0]:
        raise ValueError(f"{name}_a and {name}_b have shapes {list(up.shape)} and {list(down.shape)}")
    return up.float() @ down.flatten(1).float(), tuple(down.shape[1:])


def _cut(matrix: Tensor, max_rank: int) -> tuple[Tensor, Tensor, float]:
    """The best factors of at most a rank, and the squared norm of what they leave out."""
    u, s, v = _leading(matrix, max_rank)
    rank = min(max_rank, _numerical_rank(s))
    root = s[:rank].sqrt()
    up, down = u[:, :rank] * root, root[:, None] * v[:rank]
    return up, down, float(((matrix - up @ down).double() ** 2).sum())


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
    """How many singular values, sorted, are more than rounding; 1 at least, since factors need a rank."""
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
