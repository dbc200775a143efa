"""Captioned images of the small world: one to three objects on a named background.

Objects stand from left to right in the order in which the caption names them: so a small model can tell them apart.
None is mirrored: animals seen from the side had a head at both ends for longest.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.random import Generator

from recipe.world import (
    CLASSES,
    CLOSE_UP,
    PEOPLE,
    SIZE,
    WIDE,
    Drawings,
    Pixels,
    Square,
    article,
    background,
    look,
    place,
    squares,
)

SHOWN_MORE = 1.6  # how often a class of people is shown, compared with others: they have many forms
TWICE = 0.06  # share of scenes in which a second object has the class of the first: two women, two cats


class Picture(NamedTuple):
    """An image with its caption and the boxes of its objects.

    Attributes:
        image: Shape: [height, width, 3].
        caption: "a gray cat and a woman dressed as a cook on grass".
        objects: Class and place of every object, left to right.
    """

    image: Pixels
    caption: str
    objects: list[tuple[str, Square]]


def scene(
    rng: Generator,
    drawings: Drawings,
    *,
    size: tuple[int, int] = (SIZE, SIZE),
    count: int | None = None,
    classes: Sequence[str] = CLASSES,
    plain: bool = False,
    ground: str | None = None,
) -> Picture:
    """One image.

    Args:
        rng: Everything random comes from it.
        drawings: The artwork.
        size: Width and height; a close-up shows one object.
        count: Objects; one to three if not given.
        classes: Classes of its objects.
        plain: Objects as they are drawn, in no other colours, hair or clothes.
        ground: The background, one of `GROUNDS`; any if not given.
    """
    image, words_of_ground = background(rng, size, ground)
    found = squares(rng, _count(rng, size) if count is None else count, size)
    shares = np.array([SHOWN_MORE if name in PEOPLE else 1.0 for name in classes])
    drawn = rng.choice(list(classes), len(found), replace=len(classes) < len(found), p=shares / shares.sum())
    chosen = [str(name) for name in drawn]
    if len(found) > 1 and rng.random() < TWICE:
        chosen[1] = chosen[0]
    looks = [look(rng, drawings, name, plain=plain) for name in chosen]
    for each, square in zip(looks, found, strict=True):
        place(image, each.sprite, square)
    caption = enumerate_words([article(each.words) for each in looks])
    if rng.random() < 0.92:
        caption = f"{caption} {words_of_ground}"
    return Picture(image.clip(0, 255).astype("u1"), caption, list(zip(chosen, found, strict=True)))


def enumerate_words(names: Sequence[str]) -> str:
    """As in "a cat", "a cat and a dog", "a cat, a dog and a bear"."""
    return " and ".join((", ".join(names[:-1]), names[-1]) if len(names) > 1 else names)


def _count(rng: Generator, size: tuple[int, int]) -> int:
    if size == (CLOSE_UP, CLOSE_UP):
        return 1
    return int(rng.choice([2, 3], p=[0.4, 0.6]) if size == WIDE else rng.choice([1, 2, 3], p=[0.25, 0.58, 0.17]))
