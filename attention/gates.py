"""Gates: a factor on each concept's LoRA for every batch row, text token and image cell of one forward pass.

With gates G the bank computes y = W x + ((x A^T) * G) B^T. Every method is a choice of gates: ones are a plain merge, a
token mask is TARA, an image mask is a regional LoRA, one value per row is one LoRA per branch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from lora_compose.attention.sites import Grid, Site, SitePart, grid_at


class GateKey(NamedTuple):
    """The gates that a bank layer needs; layers with equal keys share one expanded tensor."""

    site: Site
    convolution: bool
    ranks: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Gates:
    """Factors on the LoRA deltas of `concepts` concepts during one forward pass, weights included.

    Every dimension may be 1 and is then broadcast. A tensor whose values differ by row has all
    rows.

    Attributes:
        text: For text tokens. Shape: [rows, tokens, concepts], or [texts, rows, tokens, concepts] with `several_texts`.
        image: For image cells, by level. Shape: [rows, cells, concepts], cells in row-major order.
        row: For layers with one vector per row (time embedding). Shape: [rows, concepts].
        latent_grid: Height and width of the latents.
        read: For the output of cross-attention, by level; None means `image`. Shape: as `image`, with region queries in
            place of cells where there are several texts (`RegionQueries`).
        modulation: For the modulation layers of transformers; None means `row`. Shape: [rows, concepts].
        further: For further parts of a sequence. "reference": cells of the reference images, one after the other; if it
            is missing, it is 0, or that of the image's cells, as the site says (`Site.reference_cells`). "other" is
            required where there is such a part. Shape: [rows, positions, concepts] each; positions are broadcast where
            the site knows how many there are.
        reference_modulation: For the modulation of reference images, where they have one of their own; None means 0.
            Shape: [rows, concepts].
        ranks: How many of the first ranks of each concept act (T-LoRA); None means all of one, nothing all of every.
        several_texts: Whether cells read one of several texts, whose gates `text` has one after the other.
    """

    text: Tensor
    image: Mapping[int, Tensor]
    row: Tensor
    latent_grid: Grid
    read: Mapping[int, Tensor] | None = None
    modulation: Tensor | None = None
    further: Mapping[SitePart, Tensor] = field(default_factory=dict)
    reference_modulation: Tensor | None = None
    ranks: tuple[int | None, ...] = ()
    several_texts: bool = False

    def select(self, rows: slice | list[int]) -> "Gates":
        """The gates of some of the rows."""
        return self._each(lambda gate: _rows(gate, rows, -3), lambda gate: _rows(gate, rows, -2))

    def up_to(self, end: int) -> "Gates":
        """The gates for the first tokens of the text; one for all tokens stays."""
        return replace(self, text=self.text[..., :end, :])

    def scatter_concepts(self, columns: Sequence[int], concepts: int) -> "Gates":
        """The gates as columns, the new index of each concept, of a larger concept set; the other columns are 0."""
        scattered = self._each(lambda gate: scatter_concepts(gate, columns, concepts))
        if not self.ranks:
            return scattered
        ranks = dict(zip(columns, self.ranks, strict=True))
        return replace(scattered, ranks=tuple(ranks.get(i) for i in range(concepts)))

    def strongest(self, columns: Sequence[int]) -> "Gates":
        """The gates by LoRA, whose column each concept has; where concepts overlap, the one furthest from 0 counts."""
        merged = self._each(lambda gate: strongest(gate, columns))
        ranks = tuple(self.ranks[columns.index(column)] for column in range(max(columns) + 1)) if self.ranks else ()
        return replace(merged, ranks=ranks)

    def times(self, factors: Tensor) -> "Gates":
        """The gates times one factor per concept. Shape: [concepts]."""
        return self._each(lambda gate: gate * factors)

    def acting_on_references(self, acting: Sequence[bool]) -> "Gates":
        """The gates with those of reference images: some concepts act there as strongly as anywhere in the image."""
        (image, *_) = self.image.values()

        def acts(gate: Tensor) -> Tensor:
            return torch.stack([gate[..., i] * factor for i, factor in enumerate(acting)], dim=-1)

        further = {**self.further, "reference": acts(image.amax(dim=1, keepdim=True))}
        return replace(self, further=further, reference_modulation=acts(self._modulation))

    def _each(
        self, change: Callable[[Tensor], Tensor], change_row: Callable[[Tensor], Tensor] | None = None
    ) -> "Gates":
        change_row = change_row or change
        return Gates(
            change(self.text),
            {level: change(gate) for level, gate in self.image.items()},
            change_row(self.row),
            self.latent_grid,
            None if self.read is None else {level: change(gate) for level, gate in self.read.items()},
            None if self.modulation is None else change_row(self.modulation),
            {part: change(gate) for part, gate in self.further.items()},
            None if self.reference_modulation is None else change_row(self.reference_modulation),
            self.ranks,
            self.several_texts,
        )

    def expand(self, key: GateKey, lengths: Sequence[int]) -> Tensor:
        """The factor on x A^T, the input projected to the ranks of all concepts, in one kind of layer.

        Args:
            lengths: Tokens of the text by row, for layers with text and image in one sequence.

        Returns:
            Shape: [(texts,) rows, tokens or cells, sum of ranks] for linear layers, [rows, sum of ranks, height,
            width] for convolutions, [rows, sum of ranks] for one vector per row; otherwise as the site says.

        Raises:
            KeyError: If there is no gate for the level or part: a missing gate is an error, never "ungated".
        """
        gate, grid = self._of(key.site, lengths), grid_at(self.latent_grid, key.site.level)
        # No indexing by rank: the index would have to be copied to the device.
        columns = []
        for i, rank in enumerate(key.ranks):
            limit = self.ranks[i] if self.ranks else None
            acting = rank if limit is None else min(rank, limit)
            columns.append(gate[..., i, None].expand(*gate.shape[:-1], acting))
            if acting < rank:
                columns.append(gate.new_zeros(()).expand(*gate.shape[:-1], rank - acting))
        gate = torch.cat(columns, dim=-1)
        if not key.convolution:
            return gate.contiguous()
        gate = gate.transpose(1, 2)
        return gate.reshape(*gate.shape[:2], *(grid if gate.shape[-1] > 1 else [1] * len(grid)))

    @property
    def _modulation(self) -> Tensor:
        return self.row if self.modulation is None else self.modulation

    def _of(self, site: Site, lengths: Sequence[int]) -> Tensor:
        if site.parts == ("modulation", "reference"):
            gate, of_references = self._modulation, self.reference_modulation
            both = (gate, torch.zeros_like(gate) if of_references is None else of_references)
            return torch.cat([half.expand(len(lengths), -1) for half in both])
        gate = self._by_position(site, lengths)
        if site.in_line and self.several_texts:
            gate = gate.expand(-1, -1, max(lengths), -1).transpose(0, 1).flatten(1, 2)
        if site.planar:
            grid = grid_at(self.latent_grid, site.level)
            gate = gate.unflatten(1, (1, *((1, 1) if gate.shape[1] == 1 else grid)))
        if site.flat:
            cells = prod(grid_at(self.latent_grid, site.level))
            counts = lengths if site.parts == ("text",) else [cells] * len(lengths)
            gate = _flat(gate, [site.padded(length) for length in counts])
        return gate.unsqueeze(-2) if site.extra_axis else gate

    def _by_position(self, site: Site, lengths: Sequence[int]) -> Tensor:
        parts = [self._of_part(site, part, lengths) for part in site.parts]
        if len(parts) == 1:
            return parts[0][0]
        rows = max(len(gate) for gate, _ in parts)
        return torch.cat([gate.expand(rows, positions, -1) for gate, positions in parts], dim=1)

    def _of_part(self, site: Site, part: SitePart, lengths: Sequence[int]) -> tuple[Tensor, int]:
        """The gate of one part, and how many positions it has in a sequence of several parts."""
        if part == "row":
            return self.row, 1
        if part == "modulation":
            return self._modulation, 1
        if part == "text":
            tokens = site.padded(max(lengths))
            # Rows with longer texts may be in another micro-batch.
            return self.text if site.multiple == 1 else _padded(self.text[..., :tokens, :], tokens), tokens
        known = site.reference_cells if part == "reference" else None
        if part in self.further or part == "other":
            gate = self.further[part]
            return gate, gate.shape[1] if known is None else known
        if known is not None:
            return torch.zeros_like(self.image[site.level][:, :1]), known
        image = (self.read if site.reads_text and self.read is not None else self.image)[site.level]
        cells = site.padded(prod(grid_at(self.latent_grid, site.level)))
        return _padded(image, cells), cells


def _padded(gate: Tensor, positions: int) -> Tensor:
    """Adds padding positions; a LoRA acts there only if it acts on every cell, or on every token."""
    missing = positions - gate.shape[-2]
    if gate.shape[-2] == 1 or missing <= 0:
        return gate
    return torch.cat([gate, gate.amin(dim=-2, keepdim=True).expand(*gate.shape[:-2], missing, -1)], dim=-2)


def _flat(gate: Tensor, lengths: Sequence[int]) -> Tensor:
    """The positions of all rows, row after row. Shape: [rows, positions, concepts] -> [all positions, concepts]."""
    if gate.shape[:2] == (1, 1):
        return gate[0]
    rows_of_gate = gate.expand(len(lengths), max(lengths), -1)
    return torch.cat([row[:length] for row, length in zip(rows_of_gate, lengths, strict=True)])


def _rows(gate: Tensor, rows: slice | list[int], dim: int) -> Tensor:
    chosen: list[slice | list[int]] = [slice(None)] * gate.dim()
    chosen[dim] = rows
    return gate if gate.shape[dim] == 1 else gate[tuple(chosen)]


def strongest(values: Tensor, columns: Sequence[int]) -> Tensor:
    """Values [..., concepts] as values by LoRA [..., LoRAs]: of concepts with the same one, that furthest from 0.

    `columns` has the LoRA of each concept; those of the first concepts come first.
    """
    each = values.unbind(dim=-1)
    by_lora = [each[columns.index(column)] for column in range(max(columns) + 1)]
    for value, column in zip(each, columns, strict=True):
        by_lora[column] = torch.where(value.abs() > by_lora[column].abs(), value, by_lora[column])
    return torch.stack(by_lora, dim=-1)


def scatter_concepts(values: Tensor, columns: Sequence[int], concepts: int) -> Tensor:
    """Values by concept as columns of a larger concept set; the other columns are 0.

    Args:
        values: Shape: [..., concepts of the small set].
        columns: The new index of each concept.

    Returns:
        Shape: [..., concepts].
    """
    scattered = [values.new_zeros(values.shape[:-1])] * concepts
    for column, value in zip(columns, values.unbind(dim=-1), strict=True):
        scattered[column] = value
    return torch.stack(scattered, dim=-1)
