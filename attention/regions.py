"""Region attention: which text every image cell reads, and which other cells it sees.

For a cell x, with R(x) the regions that contain it ({0}, the background, if none does), n a region with text c_n:

    cross-attention:  y(x) = mean over n in R(x) of  softmax(q(x) K(c_n)^T / sqrt(d)) V(c_n)
    self-attention:   y(x) = softmax over the cells x' with R(x) & R(x') not empty, or 0 in R(x) or 0 in R(x')

The mean is taken after the output projection, so that each text is projected with its own LoRA. Both are computed by
groups of cells in the same regions: no mask of cells x cells is needed, and a cell outside overlaps is computed once.
LoRA-Composer, arXiv 2403.11627: concept injection (eq. 1-2) and concept isolation (section 3.4).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lora_compose.attention.device import RowIndex, to_device
from lora_compose.attention.kernels import Kernel


@dataclass(frozen=True, eq=False)
class CellGroup:
    """Cells of one grid, by index, in the same regions, and those that they see if isolated; None is all."""

    cells: Tensor
    visible: Tensor | None


@dataclass(frozen=True, eq=False)
class RegionQueries:
    """Queries of cross-attention: one per region that contains the cell, otherwise one for the background text.

    They are ordered by cell, then by text, so without overlapping regions there is one per cell.

    Attributes:
        by_text: Each text that is read, with the cells that query it.
        order: Indices from the concatenation over texts to the order by cell.
        of_cell: The queries of each cell, padded, and the share of each; None with one query per cell. Shape: [cells,
            most queries of a cell] each.
    """

    by_text: Sequence[tuple[int, Tensor]]
    order: Tensor
    of_cell: tuple[Tensor, Tensor] | None

    @cached_property
    def cells(self) -> Tensor:
        """The cell of each query."""
        return torch.cat([cells for _, cells in self.by_text])[self.order]

    @classmethod
    def of(cls, membership: Tensor, device: torch.device | None = None) -> "RegionQueries":
        """Makes the queries of the cells, one for each region that has the cell. Args as for `Partition.of`."""
        texts, cells = queries_of(membership)
        by_text = tuple((text, to_device(cells[texts == text], device)) for text in texts.unique().tolist())
        order = to_device(texts.argsort(stable=True).argsort(), device)
        times = cells.bincount()[:, None]
        if times.max() == 1:
            return cls(by_text, order, None)
        nth = torch.arange(int(times.max()))
        queries = times.cumsum(dim=0) - times + nth.minimum(times - 1)
        return cls(by_text, order, (to_device(queries, device), to_device((nth < times) / times, device)))


@dataclass(frozen=True, eq=False)
class Partition:
    """The cells of one grid, divided by their regions: every cell is in one of the groups."""

    groups: Sequence[CellGroup]
    queries: RegionQueries

    @classmethod
    def of(cls, membership: Tensor, device: torch.device | None = None) -> "Partition":
        """Groups the cells of a grid by their regions.

        Cells of a region see their region and the background, and the background sees everything, as in LoRA-Composer
        (arXiv 2403.11627, section 3.4). Where regions overlap, cells see each other if they share a region, so a cell
        always sees some.

        Args:
            membership: True where a region covers a cell. Shape: [cells, regions], on the CPU.
        """
        kinds, kind_of = membership.unique(dim=0, return_inverse=True)
        background = ~membership.any(dim=1)
        groups = []
        for i, kind in enumerate(kinds):
            sees = background | (membership & kind).any(dim=1) | ~kind.any()
            visible = None if sees.all() else to_device(sees.nonzero()[:, 0], device)
            cells = to_device((kind_of == i).nonzero()[:, 0], device)
            groups.append(CellGroup(cells, visible))
        return cls(tuple(groups), RegionQueries.of(membership, device))

    @cached_property
    def restore(self) -> Tensor:
        """Indices that bring the concatenated cells of all groups back into grid order."""
        return torch.cat([group.cells for group in self.groups]).argsort()

    @cached_property
    def allowed(self) -> Tensor:
        """True where a cell sees another in isolated self-attention. Shape: [cells, cells seen]."""
        cells = len(self.restore)
        allowed = torch.ones(cells, cells, dtype=torch.bool, device=self.restore.device)
        for group in self.groups:
            if group.visible is not None:
                sees = torch.zeros(cells, dtype=torch.bool, device=allowed.device).index_fill(0, group.visible, True)
                allowed[group.cells] = sees
        return allowed


@dataclass(frozen=True, eq=False)
class RegionAttention:
    """Region attention of one forward pass: which text every cell reads, and which cells it sees.

    Attributes:
        partitions: The cells of every grid, by level.
        inject: In cross-attention, whether the cells of region n read text 1 + n and the background text 0, instead of
            text 0 everywhere. Where regions overlap, a cell gets the mean.
        isolate: Whether the cells of a region see no other region in self-attention.
        lengths: Tokens of each text, where keys and values have them one after the other in one sequence.
        others: Rows to which none of this applies, and the remaining ones; None means that it applies to all.
    """

    partitions: Mapping[int, Partition]
    inject: bool
    isolate: bool
    lengths: Sequence[int] = ()
    others: tuple[RowIndex, RowIndex] | None = None

    def attend(
        self, kernel: Kernel, level: int, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, cross: bool
    ) -> Tensor:
        """Cross- or self-attention of all rows. Args and shapes as for `cross`, or as for `self_attention`."""

        def by_region(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
            if not cross:
                return self.self_attention(kernel, level, query, key, value)
            if not self.lengths:
                return self.cross(kernel, level, query, key, value, bias)
            # Tokens behind those of the texts repeat them, to the length of the text of others.
            keys, values = (x[:, :, : sum(self.lengths)].split([*self.lengths], dim=2) for x in (key, value))
            return self.cross(kernel, level, query, keys, values, bias)

        if self.others is None:
            return by_region(query, key, value, bias)
        outputs = []
        for rows, run in zip(self.others, (kernel, by_region), strict=True):
            outputs.append(run(query[rows], key[rows], value[rows], None if bias is None else bias[rows]))
        theirs, ours = outputs
        if cross:
            theirs = self.at_queries(level, theirs.transpose(1, 2)).transpose(1, 2)
        out = ours.new_empty(len(query), *ours.shape[1:])
        out[self.others[0]], out[self.others[1]] = theirs, ours
        return out

    def cross(
        self,
        kernel: Kernel,
        level: int,
        query: Tensor,
        keys: Tensor | Sequence[Tensor],
        values: Tensor | Sequence[Tensor],
        bias: Tensor | None = None,
    ) -> Tensor:
        """Cross-attention of all region queries.

        Args:
            query: Shape: [rows, heads, cells, channels].
            keys: Shape: [texts, rows, heads, tokens, channels]; in a list, texts may have tokens of their own number.
            values: Shape: as `keys`.
            bias: Added to the scores of all queries and texts. Shape: [rows, 1, 1, tokens].

        Returns:
            Shape: [rows, heads, queries, channels]; without injection there is one query per cell.
        """
        if not self.inject:
            return kernel(query, keys[0], values[0], bias)
        queries = self.partitions[level].queries
        parts = [kernel(query[:, :, cells], keys[text], values[text], bias) for text, cells in queries.by_text]
        return torch.cat(parts, dim=2)[:, :, queries.order]

    def at_queries(self, level: int, by_cell: Tensor) -> Tensor:
        """Values of the cells at their region queries. Shape: [rows, cells, channels] -> [rows, queries, ...]."""
        queries = self.partitions[level].queries if self.inject else None
        return by_cell if queries is None or queries.of_cell is None else by_cell[:, queries.cells]

    def mean_over_queries(self, level: int, out: Tensor) -> Tensor:
        """The mean over the queries of each cell. Shape: [rows, queries, channels] -> [rows, cells, channels].

        After the output projection, where each text has its own LoRA.
        """
        of_cell = self.partitions[level].queries.of_cell if self.inject else None
        if of_cell is None:
            return out
        queries, shares = of_cell
        return (out[:, queries] * shares[..., None].to(out.dtype)).sum(dim=2)

    def self_attention(self, kernel: Kernel, level: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Self-attention. Shapes: [rows, heads, cells, channels] all."""
        if not self.isolate:
            return kernel(query, key, value)
        partition, parts = self.partitions[level], []
        for group in partition.groups:
            seen = slice(None) if group.visible is None else group.visible
            parts.append(kernel(query[:, :, group.cells], key[:, :, seen], value[:, :, seen]))
        return torch.cat(parts, dim=2)[:, :, partition.restore]


def queries_of(membership: Tensor) -> tuple[Tensor, Tensor]:
    """The text and the cell of every region query, shape [queries] each; `membership` [cells, regions] is True inside.

    Ordered by cell, then by text: 0 for the background, 1 + n for region n.
    """
    cells, texts = torch.cat([~membership.any(dim=1, keepdim=True), membership], dim=1).nonzero(as_tuple=True)
    return texts, cells
