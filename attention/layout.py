"""Regions inside attention: which text every image cell reads, and which other cells it sees."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lora_compose.attention.kernels import Kernel
from lora_compose.attention.layers import sent


@dataclass(frozen=True, eq=False)
class Group:
    """The cells of one grid that lie in the same regions.

    Attributes:
        cells: Their indices.
        visible: Indices of the cells they see in isolated self-attention; None is all.
    """

    cells: Tensor
    visible: Tensor | None


@dataclass(frozen=True, eq=False)
class Readers:
    """Who reads what in cross-attention: a cell is a reader for each of its regions, or one for the background.

    Readers are ordered by cell, then by text, so they are the cells where no regions overlap.

    Attributes:
        by_text: Every text that is read, and the cells that read it.
        order: Indices that put the readers of all texts, one text after the other, into their own order.
        of_cell: The readers that each cell is, padded, and the share of each in it; None where readers are cells.
            Shape: [cells, most readers of a cell] each.
    """

    by_text: Sequence[tuple[int, Tensor]]
    order: Tensor
    of_cell: tuple[Tensor, Tensor] | None

    @classmethod
    def of(cls, membership: Tensor, device: torch.device | None = None) -> "Readers":
        """Args: as for `Partition.of`."""
        texts, cells = read_by(membership)
        by_text = tuple((text, sent(cells[texts == text], device)) for text in texts.unique().tolist())
        order = sent(texts.argsort(stable=True).argsort(), device)
        times = cells.bincount()[:, None]
        if times.max() == 1:
            return cls(by_text, order, None)
        nth = torch.arange(int(times.max()))
        readers = times.cumsum(dim=0) - times + nth.minimum(times - 1)
        return cls(by_text, order, (sent(readers, device), sent((nth < times) / times, device)))


@dataclass(frozen=True, eq=False)
class Partition:
    """All cells of one grid, divided by the regions that they lie in.

    Attention by groups needs no mask of cells x cells, and each cell is computed once.

    Attributes:
        groups: Every cell is in one of them.
        readers: Who reads what.
    """

    groups: Sequence[Group]
    readers: Readers

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
            visible = None if sees.all() else sent(sees.nonzero()[:, 0], device)
            cells = sent((kind_of == i).nonzero()[:, 0], device)
            groups.append(Group(cells, visible))
        return cls(tuple(groups), Readers.of(membership, device))

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
        inject: In cross-attention, whether the cells of region n read text 1 + n and the background text 0, instead of
            text 0 everywhere. Where regions overlap, the mean counts of what was read and projected for each.
        isolate: Whether the cells of a region see no other region in self-attention.
    """

    partitions: Mapping[int, Partition]
    inject: bool
    isolate: bool

    def cross(self, kernel: Kernel, level: int, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Cross-attention of every reader.

        Args:
            kernel: Computes attention.
            level: The level of the layer.
            query: Shape: [rows, heads, cells, channels].
            keys: Shape: [texts, rows, heads, tokens, channels].
            values: The same shape.

        Returns:
            Shape: [rows, heads, readers, channels]; without injection cells read once.
        """
        if not self.inject:
            return kernel(query, keys[0], values[0])
        readers = self.partitions[level].readers
        parts = [kernel(query[:, :, cells], keys[text], values[text]) for text, cells in readers.by_text]
        return torch.cat(parts, dim=2)[:, :, readers.order]

    def gathered(self, level: int, out: Tensor) -> Tensor:
        """What each cell gets of its readers, their mean. Shape: [rows, readers, channels] -> [rows, cells, channels].

        After the projection of the output, since every reader has a LoRA of its own there.
        """
        of_cell = self.partitions[level].readers.of_cell if self.inject else None
        if of_cell is None:
            return out
        readers, shares = of_cell
        return (out[:, readers] * shares[..., None].to(out.dtype)).sum(dim=2)

    def self_attention(self, kernel: Kernel, level: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Self-attention. Shapes: [rows, heads, cells, channels] all."""
        if not self.isolate:
            return kernel(query, key, value)
        partition, parts = self.partitions[level], []
        for group in partition.groups:
            seen = slice(None) if group.visible is None else group.visible
            parts.append(kernel(query[:, :, group.cells], key[:, :, seen], value[:, :, seen]))
        return torch.cat(parts, dim=2)[:, :, partition.restore]


def read_by(membership: Tensor) -> tuple[Tensor, Tensor]:
    """The text and the cell of every reader.

    Args:
        membership: True where a region covers a cell. Shape: [cells, regions].

    Returns:
        Ordered by cell, then by text: 0 for the background, 1 + n for region n. Shape: [readers] each.
    """
    cells, texts = torch.cat([~membership.any(dim=1, keepdim=True), membership], dim=1).nonzero(as_tuple=True)
    return texts, cells
