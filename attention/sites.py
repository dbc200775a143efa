"""Sites: the layers that can be adapted, by what their input is and on which grid it lives."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

Grid = tuple[int, int]
"""Height and width of a grid of latent cells."""

SitePart = Literal["text", "image", "reference", "other", "row", "modulation"]
"""What lies in a layer's sequence: text tokens, image cells, cells of a reference image, or anything else, such as
audio. Or one vector per batch row (time embedding); a modulation layer has one too, and scales and shifts every token
of a transformer with its output. "modulation" and "reference" together: all rows come twice, first for the image, then
for its reference images."""


@dataclass(frozen=True, init=False)
class Site:
    """A layer that can be adapted: `Site("text", "image", level=1)`.

    Attributes:
        parts: The parts of its sequence, in order; "row" and "modulation" stand alone, but for references.
        level: How often the latent grid is halved where its output lives; 0 without a grid. A transformer with
            2 x 2 patches works at level 1.
        reads_text: True for the output projection of cross-attention.
        multiple: Text and image are each padded to a multiple of so many positions.
        flat: Whether rows and positions are one dimension of the input, row after row.
        extra_axis: Whether the input has a dimension more before its channels, e.g. layers of the text encoder.
        in_line: Whether several texts of a pass follow one another in the sequence, and are no dimension of their own.
        planar: Whether cells lie in frames, rows and columns: [rows, frames, height, width, channels].
        reference_cells: Cells of all reference images, where LoRAs act only if gates say so and which lie in no region
            of the image; None means that they are the image's own cells once more, with its gates and regions.

    Raises:
        ValueError: For a part of another name, or none.
    """

    parts: tuple[SitePart, ...]
    level: int
    reads_text: bool
    multiple: int
    flat: bool
    extra_axis: bool
    in_line: bool
    planar: bool
    reference_cells: int | None

    def __init__(
        self,
        *parts: SitePart,
        level: int = 0,
        reads_text: bool = False,
        multiple: int = 1,
        flat: bool = False,
        extra_axis: bool = False,
        in_line: bool = False,
        planar: bool = False,
        reference_cells: int | None = None,
    ) -> None:
        if not parts or not set(parts) <= set(get_args(SitePart)):
            raise ValueError(f"the parts of a site are some of {', '.join(get_args(SitePart))}, not {parts}")
        vars(self).update(
            parts=parts, level=level, reads_text=reads_text, multiple=multiple, flat=flat, extra_axis=extra_axis,
            in_line=in_line, planar=planar, reference_cells=reference_cells,
        )  # fmt: skip

    def with_parts(self, *parts: SitePart) -> "Site":
        """A site of the same layer with other parts."""
        options: dict[str, Any] = {name: value for name, value in vars(self).items() if name != "parts"}
        return Site(*parts, **options)

    def with_references(self, cells: int | None) -> "Site":
        """A site that has cells of reference images too, after the others, if it has the image's."""
        if "image" not in self.parts:
            return self
        options: dict[str, Any] = {**vars(self), "reference_cells": cells}
        return Site(*options.pop("parts"), "reference", **options)

    @property
    def joint(self) -> bool:
        """Whether text and image are in one sequence."""
        return {"text", "image"} <= set(self.parts)

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
    """The interval after `level` halvings, its end rounded up."""
    return slice(cells.start >> level, -(-cells.stop >> level))
