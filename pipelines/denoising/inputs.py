"""Further arguments of a forward pass, and what they lie on: the images of the batch, or also the grid of the latents.

Arguments that are not marked are the same for all rows, and are no tensors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from torch import Tensor

from lora_compose.pipelines.control.prepared import View, repeated


@dataclass(frozen=True, eq=False)
class ByImage:
    """An argument with a value for each image. Shape: [images or 1, ...]."""

    values: Tensor

    def of_images(self, images: Sequence[int]) -> Self:
        """The values of some images of the batch."""
        return self if len(self.values) == 1 else replace(self, values=self.values[images])

    def seen(self, view: View) -> Tensor:
        """The values that a pass sees."""
        return view.of_images(self.values)


@dataclass(frozen=True, eq=False)
class OnGrid(ByImage):
    """An input [images or 1, channels, height, width] on the latents' grid; a pass of a part sees that part."""

    def seen(self, view: View) -> Tensor:
        """The values that a pass sees."""
        return view.of_cells(self.values, 0)


def check_marked(inputs: Mapping[str, Any]) -> None:
    """Checks that it is known what the arguments lie on; raises TypeError for tensors without a mark."""
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            raise TypeError(f"the argument {name!r} is a tensor; expected ByImage or OnGrid, which say what it lies on")


def of_images(inputs: Mapping[str, Any], images: Sequence[int]) -> Mapping[str, Any]:
    """The arguments for some images of the batch."""
    return {name: value.of_images(images) if isinstance(value, ByImage) else value for name, value in inputs.items()}


def for_rows(inputs: Mapping[str, Any], view: View, rows: int) -> Mapping[str, Any]:
    """The arguments of one pass as the model takes them."""
    return {name: repeated(v.seen(view), rows) if isinstance(v, ByImage) else v for name, v in inputs.items()}
