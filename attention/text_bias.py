"""A bias on attention scores between image cells and text tokens, as a product of thin factors.

For cell x and token t, with one column for each of a few subjects,

    b(x, t) = sum_i cells_i(x) tokens_i(t)

Cross-attention gets the product. A transformer that attends to text and image in one sequence gets it in both
directions without a matrix of positions x positions: queries and keys have a few channels more, whose products are b,

    query: [cells, 0] at cells, [0, tokens] at tokens        key: [0, cells] at cells, [tokens, 0] at tokens
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TextBias:
    """The factors of a bias.

    Attributes:
        cells: By level. Shape: [rows, cells, subjects] each.
        tokens: Shape: [rows, tokens, subjects].
    """

    cells: Mapping[int, Tensor]
    tokens: Tensor

    @classmethod
    def between(cls, cells: Mapping[int, Tensor], phrases: Tensor, own: float, other: float) -> "TextBias":
        """The bias between the regions of subjects and their words.

        For cell x with the share M_i(x) in the region of subject i, and token t of the words of subject j, it is the
        sum of own * M_j(x) and other * M_i(x) over all i other than j. FreeFuse, arXiv 2510.23515.

        Args:
            cells: The shares, by level. Shape: [rows, cells, subjects] each.
            phrases: 1 at the words of each subject. Shape: [rows, tokens, subjects].
            own: Added between a region and the words of its subject.
            other: Added between a region and the words of other subjects.
        """
        others = phrases.sum(dim=-1, keepdim=True) - phrases
        return cls(cells, own * phrases + other * others)

    def select(self, rows: slice | Sequence[int]) -> "TextBias":
        """The bias of some of the rows."""
        chosen = rows if isinstance(rows, slice) else list(rows)
        return TextBias({level: cells[chosen] for level, cells in self.cells.items()}, self.tokens[chosen])

    def up_to(self, end: int) -> "TextBias":
        """The bias on the first tokens."""
        return TextBias(self.cells, self.tokens[:, :end])

    def to(self, device: torch.device) -> "TextBias":
        """Factors on a device."""
        return TextBias({level: cells.to(device) for level, cells in self.cells.items()}, self.tokens.to(device))

    def scores(self) -> Mapping[int, Tensor]:
        """The bias itself, by level. Shape: [rows, cells, tokens] each."""
        return {level: cells @ self.tokens.transpose(1, 2) for level, cells in self.cells.items()}

    def channels(self, level: int, positions: int, text: slice, image: slice, scale: float) -> tuple[Tensor, Tensor]:
        """Channels of queries and keys whose products, times a scale, are the bias in both directions.

        Args:
            positions: Length of the sequence.
            text: Where the text is in it; further tokens than the bias has get none.
            image: Where the cells are.
            scale: Factor on the products of queries and keys.

        Returns:
            Shape: [rows, positions, channels] each, with a multiple of 8 channels, as fast kernels need it.
        """
        cells, tokens = self.cells[level], self.tokens[:, : text.stop - text.start] / scale
        subjects, end = cells.shape[2], text.start + tokens.shape[1]
        query = cells.new_zeros(len(cells), positions, -(-2 * subjects // 8) * 8)
        key = torch.zeros_like(query)
        query[:, image, :subjects] = key[:, image, subjects : 2 * subjects] = cells
        query[:, text.start : end, subjects : 2 * subjects] = key[:, text.start : end, :subjects] = tokens
        return query, key
