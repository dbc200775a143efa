"""Boxes on a canvas: templates, a free place for one more, and drawn boxes fitted to the canvas."""

from collections.abc import Sequence
from itertools import accumulate, combinations, product

from lora_compose.pipelines.scene.mask_images import Box

LEAST = 8
"""Least side of a box in pixels: one latent cell."""

_MARGIN = 1 / 32  # of the canvas, between boxes and its edges
_ROOM = 1 / 4  # of the canvas' sides, that a free place has at least
_BIG = 0.62  # of the width, for the big one of "big and small"

TEMPLATES = {"Side by side": 2, "Three in a row": 3, "Big and small": 2}
"""Names of templates, with the number of concepts that each is for."""


def template(name: str, number: int, width: int, height: int) -> list[Box]:
    """Boxes for a number of concepts, by one of `TEMPLATES`, on a canvas in pixels.

    The rows take any number of concepts, "Big and small" makes all but the first small.
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


def one_more(taken: Sequence[Box], width: int, height: int) -> list[Box]:
    """Boxes with one more, in the largest free place of a canvas in pixels, or in a half of the largest box."""
    if not taken:
        return template("Side by side", 1, width, height)
    gap = max(1.0, _MARGIN * width)
    left, top, right, bottom = max(_free(taken, width, height), key=_area, default=(0, 0, 0, 0))
    free = left + gap, top + gap, right - gap, bottom - gap
    if free[2] - free[0] >= _ROOM * width and free[3] - free[1] >= _ROOM * height:
        return [*taken, fitted(free, width, height)]
    divided = max(range(len(taken)), key=lambda i: _area(taken[i]))
    kept, new = (fitted(half, width, height) for half in _halves(taken[divided], gap))
    return [*taken[:divided], kept, *taken[divided + 1 :], new]


def _free(taken: Sequence[Box], width: int, height: int) -> list[Box]:
    """Rectangles between the edges of boxes and canvas that overlap no box."""
    across = sorted({0, width, *(edge for box in taken for edge in (box[0], box[2]))})
    down = sorted({0, height, *(edge for box in taken for edge in (box[1], box[3]))})
    return [
        (left, top, right, bottom)
        for (left, right), (top, bottom) in product(combinations(across, 2), combinations(down, 2))
        if all(box[2] <= left or right <= box[0] or box[3] <= top or bottom <= box[1] for box in taken)
    ]


def _halves(box: Box, gap: float) -> list[tuple[float, float, float, float]]:
    """Both halves of a box, divided across its longer side, with a gap between them."""
    left, top, right, bottom = box
    if right - left >= bottom - top:
        middle = (left + right) / 2
        return [(left, top, middle - gap / 2, bottom), (middle + gap / 2, top, right, bottom)]
    middle = (top + bottom) / 2
    return [(left, top, right, middle - gap / 2), (left, middle + gap / 2, right, bottom)]


def _area(box: Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def fitted(box: Sequence[float], width: int, height: int) -> Box:
    """A box in whole pixels inside the canvas, its corners in order, its sides of the least length at least."""
    left, right = _stretch(box[0], box[2], width)
    top, bottom = _stretch(box[1], box[3], height)
    return left, top, right, bottom


def _stretch(a: float, b: float, length: int) -> tuple[int, int]:
    low, high = sorted((round(a), round(b)))
    low = max(0, min(low, length - LEAST))
    return low, min(length, max(high, low + LEAST))
