"""What all mergers share: a change of one layer as a product of two thin matrices, and its singular values.

A LoRA's factors are not unique: (B M)(M^-1 A) is the same change for every invertible M. An entry-wise operation on A
or B alone depends on M, so it is not an operation on the change. All mergers here give the same result for all factors
of the same changes. They work in fp64 on the CPU and build no change whole, unless their docstring says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_compose.attention.lora_bank import LoraFactors
from lora_compose.pipelines.formats.change import TINY

_TINY_SQUARE = TINY**2  # the same of squares of singular values


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The singular value decomposition of a change, U diag(values) V^T, without values that are rounding.

    Attributes:
        u: Shape: [outputs, rank], orthonormal columns.
        values: Shape: [rank], descending.
        v: Shape: [inputs, rank], orthonormal columns.
    """

    u: Tensor
    values: Tensor
    v: Tensor

    @property
    def rank(self) -> int:
        """Number of singular values."""
        return len(self.values)

    def factors(self, rank: int | None = None) -> LoraFactors:
        """The best approximation of a rank (Eckart-Young), both factors of the same size; all of it by default."""
        root = self.values[:rank].sqrt()
        return LoraFactors(root[:, None] * self.v[:, :rank].T, self.u[:, :rank] * root)


@dataclass(frozen=True, eq=False)
class OrthonormalRows:
    """Factors of a change whose down has orthonormal rows, `white` times the down that was given."""

    up: Tensor
    down: Tensor
    white: Tensor


def matrices(change: LoraFactors) -> tuple[Tensor, Tensor]:
    """Up [outputs, rank] with the scale in it, and down [rank, inputs times kernel], in fp64."""
    return change.up.flatten(1).double() * change.scale, change.down.flatten(1).double()


def scaled(change: LoraFactors, number: float) -> LoraFactors:
    """A change times a number."""
    return replace(change, scale=change.scale * number)


def absent(change: LoraFactors) -> LoraFactors:
    """Factors of rank 0, in the shape of another change: no change."""
    up, down = change.up.flatten(1), change.down.flatten(1)
    return LoraFactors(down.new_zeros(0, down.shape[1]), up.new_zeros(up.shape[0], 0))


def spectrum(change: LoraFactors) -> Spectrum:
    """The singular values and vectors of a change, from its factors: O((outputs + inputs) rank^2)."""
    up, down = matrices(change)
    left, right = torch.linalg.qr(up), torch.linalg.qr(down.T)
    u, values, vh = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    kept = _above_rounding(values)
    return Spectrum(left.Q @ u[:, kept], values[kept], right.Q @ vh.T[:, kept])


def orthonormal_rows(change: LoraFactors) -> OrthonormalRows:
    """Factors of a change whose down has orthonormal rows, without rows that add nothing."""
    up, down = matrices(change)
    values, vectors = torch.linalg.eigh(down @ down.T)
    kept = values > values[-1] * _TINY_SQUARE
    root, vectors = values[kept].sqrt(), vectors[:, kept]
    white = vectors.T / root[:, None]
    return OrthonormalRows(up @ vectors * root, white @ down, white)


def concatenated(changes: Sequence[LoraFactors]) -> LoraFactors:
    """The exact sum of changes: factors side by side, so that no product has factors of two LoRAs."""
    ups, downs = zip(*map(matrices, changes), strict=True)
    return LoraFactors(torch.cat(downs), torch.cat(ups, dim=1))


def left_space(spectra: Sequence[Spectrum]) -> Tensor:
    """Orthonormal columns that span the outputs of all changes: left singular vectors of the changes side by side.

    They are those of [U_1 S_1 | U_2 S_2 | ...], since the V_i^T that follow have orthonormal rows.
    """
    beside = torch.cat([change.u * change.values for change in spectra], dim=1)
    u, values, _ = torch.linalg.svd(beside, full_matrices=False)
    return u[:, _above_rounding(values)]


def coefficients(space: Tensor, change: Spectrum) -> Tensor:
    """A change in the coordinates of a space that contains its outputs. Shape: [dimensions, inputs]."""
    return (space.T @ change.u * change.values) @ change.v.T


def gram(changes: Sequence[LoraFactors]) -> Tensor:
    """Frobenius inner products of changes of a layer, none of which is built, to fp32. Shape: [changes, changes]."""
    up = torch.cat([change.up.flatten(1).float() * change.scale for change in changes], dim=1)
    down = torch.cat([change.down.flatten(1).float() for change in changes])
    products = ((up.T @ up) * (down @ down.T)).double()
    return by_change(products, changes)


def by_change(products: Tensor, changes: Sequence[LoraFactors]) -> Tensor:
    """Products of the ranks of changes, summed for each pair of changes. Shape: [..., changes, changes]."""
    change_of = torch.repeat_interleave(torch.arange(len(changes)), torch.tensor([change.rank for change in changes]))
    membership = torch.nn.functional.one_hot(change_of, len(changes)).to(products)
    return membership.T @ products @ membership


def _above_rounding(values: Tensor) -> Tensor:
    return values > values[0] * TINY if len(values) else torch.zeros(0, dtype=torch.bool)
