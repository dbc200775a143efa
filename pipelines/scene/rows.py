"""The rows of a pass and their roles: image, branch, conditional or not. Nothing else says what a row is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

Selection = slice | list[int]
"""Some rows: a slice where they lie at equal distances, since a slice copies nothing; otherwise their indices."""


class Row(NamedTuple):
    """The role of one row.

    Attributes:
        image: Index of the image.
        branch: Index of the branch; an unconditional row that several branches share has that of the first.
        conditional: Whether it reads the prompt; otherwise it reads the negative one.
    """

    image: int
    branch: int
    conditional: bool


@dataclass(frozen=True)
class Rows:
    """The roles of all rows of a pass, branch by branch, each with one row per image.

    Branches may come in any order. The images of each are those of the latents, in their order.

    Raises:
        ValueError: For rows that lie in another way.
    """

    each: tuple[Row, ...]

    def __post_init__(self) -> None:
        images = sorted({row.image for row in self.each})
        expected = [Row(image, *branch) for branch in self.branches for image in images]
        if list(self.each) != expected:
            raise ValueError(
                f"rows must lie branch by branch, each with the images {images} in this order, as in the latents; "
                f"these are {', '.join(map(str, self.each))}"
            )

    @classmethod
    def of(cls, images: int, unconds: int, branches: int = 1) -> "Rows":
        """Unconditional branches, then conditional ones."""
        parts = [*((branch, False) for branch in range(unconds)), *((branch, True) for branch in range(branches))]
        return cls(tuple(Row(image, *part) for part in parts for image in range(images)))

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.each)

    @property
    def images(self) -> int:
        """Number of images."""
        return len({row.image for row in self.each})

    @property
    def branches(self) -> Sequence[tuple[int, bool]]:
        """Branch, and whether it is conditional, in the order of the rows."""
        return list(dict.fromkeys((row.branch, row.conditional) for row in self.each))

    @property
    def conditional(self) -> Selection:
        """The conditional rows."""
        return self.where(lambda row: row.conditional)

    @property
    def unconditional(self) -> Selection:
        """The unconditional rows."""
        return self.where(lambda row: not row.conditional)

    def where(self, chosen: Callable[[Row], bool]) -> Selection:
        """The rows of a role."""
        indices = [index for index, row in enumerate(self.each) if chosen(row)]
        if not indices:
            return slice(0, 0)
        step = indices[1] - indices[0] if len(indices) > 1 else 1
        regular = indices == list(range(indices[0], indices[-1] + 1, step))
        return slice(indices[0], indices[-1] + 1, None if step == 1 else step) if regular else indices

    def select(self, rows: Selection) -> "Rows":
        """The roles of some rows; of each branch it takes all images, the same ones, or none."""
        return Rows(self.each[rows] if isinstance(rows, slice) else tuple(self.each[row] for row in rows))

    def of_images(self, images: int) -> "Rows":
        """The branches for another number of images."""
        return Rows(tuple(Row(image, *branch) for branch in self.branches for image in range(images)))
