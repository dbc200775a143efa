"""Sites: the layers that can be adapted, by what their input is and on which grid it lives."""

from dataclasses import dataclass
from typing import Literal

Grid = tuple[int, int]
"""Height and width of a grid of latent cells."""

Stream = Literal["text", "image", "joint", "row", "modulation"]
"""Input of a layer: text tokens, image cells, both in one sequence, or one vector per batch row (time embedding). A
modulation layer has one vector per row too, and scales and shifts every token of a transformer with its output."""


@dataclass(frozen=True)
class Site:
    """A layer that can be adapted.

    Attributes:
        stream: What its input is.
        level: How often the latent grid is halved where its output lives; 0 without a grid. A transformer with
            2 x 2 patches works at level 1.
        reads_text: True for the output projection of cross-attention.
        image_first: In a joint sequence, whether image cells come before text tokens.
        multiple: Text and image are each padded to a multiple of so many positions.
        flat: Whether rows and positions are one dimension of the input, row after row.
        extra_axis: Whether the input has a dimension more before its channels (Krea 2: layers of the text encoder).
        references: Number of reference images of the size of the image; their cells follow those of the image.
    """

    stream: Stream
    level: int = 0
    reads_text: bool = False
    image_first: bool = False
    multiple: int = 1
    flat: bool = False
    extra_axis: bool = False
    references: int = 0

    def padded(self, positions: int) -> int:
        """How long a part of the sequence is with its padding."""
        return -(-positions // self.multiple) * self.multiple


def grid_at(latent_grid: Grid, level: int) -> Grid:
    """The grid after `level` halvings, rounded up as strided convolutions do."""
    height, width = latent_grid
    for _ in range(level):
        height, width = (height + 1) // 2, (width + 1) // 2
    return height, width


def coarser(cells: slice, level: int) -> slice:
    """The same interval after `level` halvings, its end rounded up."""
    return slice(cells.start >> level, -(-cells.stop >> level))
