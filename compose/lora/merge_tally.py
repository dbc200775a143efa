"""How much of each file a merge keeps, block by block."""

import math
from collections.abc import Iterator
from itertools import chain, combinations

import torch
from pydantic import BaseModel
from torch import Tensor

from lora_compose.attention import LoraFactors
from lora_compose.pipelines.merging import Changes
from lora_compose.pipelines.merging.factors import gram


class MergedBlock(BaseModel, frozen=True):
    """The merge of one block of a model.

    Attributes:
        name: Such as "unet.down_blocks.1"; "all" for the whole file.
        ranks_before: Smallest and largest sum of ranks of a layer.
        ranks_after: Smallest and largest rank of a layer that was written.
        norm: Frobenius norm of what was written.
        energy: Squared norm, divided by that of the weighted sum of the changes; None if that is 0.
        kept: By file, how much of its weighted change D is in the result M: <M, D> / |D|^2. 1 means all of it, and more
            that other files add to it; None if the file changes nothing.
        cut: The fraction of the energy that is left after the cut to a rank; 1 without a cut.
        overlaps: By pair of files, <A, B>^2 / (|A|^2 |B|^2).
    """

    name: str
    layers: int
    ranks_before: tuple[int, int]
    ranks_after: tuple[int, int]
    norm: float
    energy: float | None
    kept: tuple[float | None, ...]
    cut: float
    overlaps: tuple[float, ...]


class Tally:
    """Inner products of all changes and of the results, summed by block."""

    def __init__(self, files: int) -> None:
        self._files = files
        self._sums: dict[str, Tensor] = {}
        self._whole: dict[str, float] = {}
        self._ranks: dict[str, list[tuple[int, int]]] = {}

    @property
    def written(self) -> int:
        """The sum of the ranks that are written."""
        return sum(after for ranks in self._ranks.values() for _, after in ranks)

    def add(self, block: str, changes: Changes, merged: LoraFactors, kept: float) -> None:
        """Adds a layer: its changes, the result, and the share of its energy that the cut to a rank kept."""
        products = gram([*changes, merged])
        self._sums[block] = self._sums.get(block, 0) + products
        self._whole[block] = self._whole.get(block, 0.0) + float(products[-1, -1]) / kept
        self._ranks.setdefault(block, []).append((sum(change.rank for change in changes), merged.rank))

    def blocks(self) -> Iterator[MergedBlock]:
        """The merge of each block, and of the whole."""
        for name, products in self._sums.items():
            yield self._block(name, products, self._whole[name], self._ranks[name])
        products = sum(self._sums.values(), torch.zeros(()))
        yield self._block("all", products, sum(self._whole.values()), [*chain(*self._ranks.values())])

    def _block(self, name: str, products: Tensor, uncut: float, ranks: list[tuple[int, int]]) -> MergedBlock:
        n = self._files
        energy = products.diagonal().clamp(min=0).tolist()
        whole = float(products[:n, :n].sum())
        before, after = zip(*ranks, strict=True)
        return MergedBlock(
            name=name, layers=len(ranks), ranks_before=(min(before), max(before)), ranks_after=(min(after), max(after)),
            norm=math.sqrt(energy[n]), energy=energy[n] / whole if whole > 0 else None,
            kept=tuple(float(products[i, n]) / energy[i] if energy[i] else None for i in range(n)),
            cut=min(1.0, energy[n] / uncut) if uncut > 0 else 1.0,
            overlaps=tuple(_share(float(products[i, j]), energy[i], energy[j]) for i, j in combinations(range(n), 2)),
        )  # fmt: skip


def _share(product: float, one: float, other: float) -> float:
    return min(1.0, product**2 / (one * other)) if one > 0 and other > 0 else 0.0
