"""Boxes on a canvas: templates, and what was drawn made to fit."""

from collections.abc import Sequence
from itertools import accumulate

Box = tuple[int, int, int, int]

LEAST = 8
"""Pixels that a side of a box has at least: one cell of the latents."""

_MARGIN = 1 / 32  # of the canvas, between boxes and its edges
_BIG = 0.62  # of the width, for the big one of "big and small"

TEMPLATES = {"Side by side": 2, "Three in a row": 3, "Big and small": 2}
"""Names of templates, and for how many concepts they are made."""


def template(name: str, number: int, width: int, height: int) -> list[Box]:
    """Boxes for so many concepts.

    Args:
        name: One of `TEMPLATES`. The rows take any number of concepts, "Big and small" makes all but the first small.
        number: How many concepts there are.
        width: Of the canvas, in pixels.
        height: Of the canvas, in pixels.
    """
    if name == "Big and small" and number > 1:
        shares = [_BIG, *[(1 - _BIG) / (number - 1)] * (number - 1)]
        small = [0.0, *[0.45] * (number - 1)]
    else:
        shares, small = [1 / number] * number, [0.0] * number
    edges = [0.0, *accumulate(shares)]
    gap = max(1.0, _MARGIN * width)
    return [
        fitted((left * width + gap / 2, _MARGIN * height + low * height, right * width - gap / 2,
                (1 - _MARGIN) * height), width, height)
        for left, right, low in zip(edges, edges[1:], small, strict=False)
    ]  # fmt: skip


def fitted(box: Sequence[float], width: int, height: int) -> Box:
    """A box in whole pixels inside the canvas, its corners in order, its sides of the least length at least."""
    left, right = _stretch(box[0], box[2], width)
    top, bottom = _stretch(box[1], box[3], height)
    return left, top, right, bottom


def _stretch(a: float, b: float, length: int) -> tuple[int, int]:
    low, high = sorted((round(a), round(b)))
    low = max(0, min(low, length - LEAST))
    return low, min(length, max(high, low + LEAST))
