"""A layer's change as the factors that gates act between; cut to a rank, and compared, without building it.

A change of more rank than wanted is replaced by the best approximation of that rank (Eckart-Young).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_compose.attention.lora_bank import LoraFactors
from lora_compose.pipelines.support.finite import all_finite

MAX_RANK = 128
"""Changes of adapters other than LoRA are kept exactly up to this rank."""

TINY = 1e-6
"""Singular values below this share of the largest are rounding: files have fp32 at best."""


@dataclass(frozen=True, eq=False)
class Change:
    """A layer's change as factors; `lost` is the squared Frobenius norm of what they leave out."""

    factors: LoraFactors
    lost: float = 0.0


def inner(first: LoraFactors, second: LoraFactors) -> float:
    """The Frobenius inner product of two changes of one layer, without building either.

    tr((B1 A1)^T B2 A2) = sum((B1^T B2) * (A1 A2^T)).
    """
    if first.left is not None or second.left is not None:
        return _inner_of_products(first, second)
    ups = first.up.flatten(1).double().T @ second.up.flatten(1).double()
    downs = first.down.flatten(1).double() @ second.down.flatten(1).double().T
    return float((ups * downs).sum()) * first.scale * second.scale


def _inner_of_products(first: LoraFactors, second: LoraFactors) -> float:
    """<K1 (x) D1, K2 (x) D2> = <K1, K2> <D1, D2>, of products of equal shapes."""
    if first.left is None or second.left is None or first.left.shape != second.left.shape:
        return float((first.delta().double() * second.delta().double()).sum())
    return float((first.left.double() * second.left.double()).sum()) * inner(
        replace(first, left=None), replace(second, left=None)
    )


def matrix(tensor: Tensor) -> Tensor:
    """A tensor as a matrix of outputs and inputs, in fp32 at least."""
    return tensor.flatten(1).to(torch.promote_types(tensor.dtype, torch.float32))


def check_finite(*tensors: Tensor, lost: float = 0.0) -> None:
    """Raises ValueError if products have overflowed."""
    if not (all(map(all_finite, tensors)) and math.isfinite(lost)):
        raise ValueError("its numbers are too large to be multiplied")


def shaped(up: Tensor, down: Tensor, lost: float, inputs: Sequence[int]) -> Change:
    """Factors in the shape of their layer, whose weight has these sides beside its outputs: convolutions have a kernel.

    Raises:
        ValueError: If numbers have overflowed, or such a weight is no matrix and no convolution.
    """
    check_finite(up, down, lost=lost)
    if len(inputs) == 3:
        down, up = down.view(-1, *inputs), up[:, :, None, None]
    elif len(inputs) != 1:
        raise ValueError(f"a weight with inputs of shape {list(inputs)} is neither a matrix nor a convolution")
    return Change(LoraFactors(down.contiguous(), up.contiguous()), lost)


def cut(whole: Tensor, max_rank: int) -> tuple[Tensor, Tensor, float]:
    """The best factors of at most a rank, and the squared norm of the part that they leave out."""
    u, s, v = leading(whole, max_rank)
    rank = min(max_rank, numerical_rank(s))
    root = s[:rank].sqrt()
    up, down = u[:, :rank] * root, root[:, None] * v[:rank]
    return up, down, float(((whole - up @ down).double() ** 2).sum())


def cut_factors(up: Tensor, down: Tensor, max_rank: int) -> tuple[Tensor, Tensor, float]:
    """Does what `cut` does for the product of two factors, which is not built."""
    left, right = torch.linalg.qr(up.double()), torch.linalg.qr(down.double().T)
    u, s, v = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    rank = min(max_rank, numerical_rank(s))
    root = s[:rank].sqrt()
    up, down = (left.Q @ u[:, :rank]) * root, root[:, None] * (v[:rank] @ right.Q.T)
    return up.float(), down.float(), float((s[rank:] ** 2).sum())


def leading(whole: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The singular vectors and values; of large matrices only the leading ones (Halko et al., arXiv 0909.4061)."""
    few = rank + 16
    if min(whole.shape) <= 3 * few:
        return torch.linalg.svd(whole, full_matrices=False)
    generator = torch.Generator().manual_seed(0)
    span = torch.randn(whole.shape[1], few, generator=generator, dtype=whole.dtype)
    for _ in range(4):
        span = whole.T @ torch.linalg.qr(whole @ span).Q
        span = torch.linalg.qr(span).Q
    basis = torch.linalg.qr(whole @ span).Q
    u, s, v = torch.linalg.svd(basis.T @ whole, full_matrices=False)
    return basis @ u, s, v


def numerical_rank(values: Tensor) -> int:
    """Number of sorted singular values above rounding; at least 1, since factors need a rank."""
    return max(1, int((values > values[0] * TINY).sum())) if len(values) else 1
