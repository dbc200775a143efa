"""Regions inside attention: which text every image cell reads, and which other cells it sees."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from attention.processors import Kernel


@dataclass(frozen=True, eq=False)
class Group:
    """The cells of one grid that lie in the same regions.

    Attributes:
        regions: Which regions, in order; empty for the background.
        cells: Their indices.
        visible: Indices of the cells they see in isolated self-attention; None is all.
    """

    regions: tuple[int, ...]
    cells: Tensor
    visible: Tensor | None


@dataclass(frozen=True, eq=False)
class Partition:
    """All cells of one grid, divided by the regions that they lie in.

    Attention by groups needs no mask of cells x cells, and each cell is computed once.

    Attributes:
        groups: Every cell is in one of them.
    """

    groups: Sequence[Group]

    @classmethod
    def of(cls, membership: Tensor, device: torch.device | None = None) -> "Partition":
        """Divides a grid.

        Cells of a region see their region and the background, and the background sees everything, as in LoRA-Composer
        (arXiv 2403.11627, section 3.4). Where regions overlap, cells see each other if they share a region, so nobody
        is ever left without anything to see.

        Args:
            membership: True where a region covers a cell. Shape: [cells, regions], on the CPU.
            device: Where attention runs.
        """
        kinds, kind_of = membership.unique(dim=0, return_inverse=True)
        background = ~membership.any(dim=1)
        groups = []
        for i, kind in enumerate(kinds):
            sees = background | (membership & kind).any(dim=1) | ~kind.any()
            visible = None if sees.all() else sees.nonzero()[:, 0].to(device)
            cells = (kind_of == i).nonzero()[:, 0].to(device)
            groups.append(Group(tuple(kind.nonzero()[:, 0].tolist()), cells, visible))
        return cls(tuple(groups))

    @cached_property
    def restore(self) -> Tensor:
        """Indices that put the cells of all groups, one after the other, into their own order."""
        return torch.cat([group.cells for group in self.groups]).argsort()

    @cached_property
    def allowed(self) -> Tensor:
        """True where a cell sees another. Shape: [cells, cells seen]."""
        cells = len(self.restore)
        allowed = torch.ones(cells, cells, dtype=torch.bool, device=self.restore.device)
        for group in self.groups:
            if group.visible is not None:
                sees = torch.zeros(cells, dtype=torch.bool, device=allowed.device).index_fill(0, group.visible, True)
                allowed[group.cells] = sees
        return allowed


@dataclass(frozen=True, eq=False)
class Layout:
    """What attention does differently in the regions of one call.

    Attributes:
        partitions: The cells of every grid, by level.
        inject: In cross-attention, whether the cells of region n read text 1 + n and the background text 0 (the mean
            where regions overlap), instead of text 0 everywhere.
        isolate: Whether the cells of a region see no other region in self-attention.
    """

    partitions: Mapping[int, Partition]
    inject: bool
    isolate: bool

    def cross(self, kernel: "Kernel", level: int, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Cross-attention.

        Args:
            kernel: Computes attention.
            level: The level of the layer.
            query: Shape: [rows, heads, cells, channels].
            keys: Shape: [texts, rows, heads, tokens, channels].
            values: The same shape.

        Returns:
            Shape: as query.
        """
        if not self.inject:
            return kernel(query, keys[0], values[0])
        partition, parts = self.partitions[level], []
        for group in partition.groups:
            mine = query[:, :, group.cells]
            read = [kernel(mine, keys[text], values[text]) for text in ([1 + n for n in group.regions] or [0])]
            parts.append(read[0] if len(read) == 1 else torch.stack(read).mean(dim=0))
        return torch.cat(parts, dim=2)[:, :, partition.restore]

    def self_attention(self, kernel: "Kernel", level: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Self-attention. Shapes: [rows, heads, cells, channels] all."""
        if not self.isolate:
            return kernel(query, key, value)
        partition, parts = self.partitions[level], []
        for group in partition.groups:
            seen = slice(None) if group.visible is None else group.visible
            parts.append(kernel(query[:, :, group.cells], key[:, :, seen], value[:, :, seen]))
        return torch.cat(parts, dim=2)[:, :, partition.restore]
