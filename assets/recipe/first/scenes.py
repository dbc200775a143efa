"""Captioned pictures of the emoji world: one to three objects, dyed or patterned now and then, on a named background.

Objects stand from left to right in the order in which the caption names them: so a small model can tell them apart.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.random import Generator
from torch import Tensor
from torch.utils.data import IterableDataset

from lora_compose.compose.support.precision import cpu_autocast
from recipe.first.world import (
    BASE_CLASSES,
    BASE_VENDORS,
    CLOSE_UP,
    HUES,
    PALE,
    PATTERNS,
    SIZE,
    Coat,
    Pixels,
    Sprites,
    Square,
    article,
    background,
    dress,
    place,
    squares,
)

WIDE = (192, 128)  # width and height: room for three objects of the size that two have elsewhere
FLOOR = 90  # saturation of colours that have a word, which is less than that of the concepts' coats


Where = Callable[[Generator, int, tuple[int, int]], list[Square]]
"""Chooses places for so many objects in an image of some width and height."""


class Picture(NamedTuple):
    """A picture with its caption and the boxes of its objects.

    Attributes:
        image: Shape: [height, width, 3].
        caption: "a red cat and a dog on grass".
        objects: Class and place of every object, left to right.
    """

    image: Pixels
    caption: str
    objects: list[tuple[str, Square]]


def scene(
    rng: Generator,
    sprites: Sprites,
    *,
    size: tuple[int, int] = (SIZE, SIZE),
    count: int | None = None,
    where: Where = squares,
    classes: Sequence[str] = BASE_CLASSES,
    vendors: Sequence[str] = BASE_VENDORS,
    plain: bool = False,
) -> Picture:
    """One picture.

    Args:
        rng: Everything random comes from it.
        sprites: The artwork.
        size: Width and height; a close-up shows one object.
        count: Objects; one to three if not given.
        where: Chooses their places, left to right.
        classes: Classes of its objects.
        vendors: Their artwork.
        plain: Objects as they are drawn, neither dyed nor patterned.
    """
    image, ground = background(rng, size)
    if count is None:
        count = _count(rng, size)
    where_to = where(rng, count, size)
    chosen = [str(name) for name in rng.choice(list(classes), count, replace=False)]
    names = []
    for name, square in zip(chosen, where_to, strict=True):
        sprite = sprites[f"{name}/{vendors[int(rng.integers(len(vendors)))]}"]
        dressed, words = (sprite, name) if plain else _dressed(rng, sprite, name)
        names.append(article(words))
        place(image, dressed, square, rng.random() < 0.5)
    caption = enumerate_words(names)
    if rng.random() < 0.3:
        caption = f"a picture of {caption}"
    if rng.random() < 0.9:
        caption = f"{caption} {ground}"
    return Picture(image.clip(0, 255).astype("u1"), caption, list(zip(chosen, where_to, strict=True)))


def enumerate_words(names: Sequence[str]) -> str:
    """As in "a cat", "a cat and a dog", "a cat, a dog and a bear"."""
    return " and ".join((", ".join(names[:-1]), names[-1]) if len(names) > 1 else names)


def _count(rng: Generator, size: tuple[int, int]) -> int:
    if size == (CLOSE_UP, CLOSE_UP):
        return 1
    return int(rng.choice([2, 3], p=[0.4, 0.6]) if size == WIDE else rng.choice([1, 2, 3], p=[0.4, 0.42, 0.18]))


def _dressed(rng: Generator, sprite: Pixels, name: str) -> tuple[Pixels, str]:
    """A sprite as drawn, dyed or patterned, and its words."""
    kind, hues = rng.random(), list(HUES.values())
    if kind < 0.12:
        pattern = list(PATTERNS)[rng.integers(len(PATTERNS))]
        second = hues[rng.integers(len(hues))] if rng.random() < 0.6 else PALE
        coat = Coat(pattern, hues[rng.integers(len(hues))], second)
        return dress(sprite, coat, floor=FLOOR, stretch=rng.uniform(0.6, 1.2)), f"{PATTERNS[pattern]} {name}"
    if kind < 0.47:
        colour = list(HUES)[rng.integers(len(HUES))]
        return dress(sprite, Coat(None, HUES[colour]), floor=FLOOR), f"{colour} {name}"
    return sprite, name


class Batch(NamedTuple):
    """Pictures of one size as the VAE sees them (means; not scaled), and their captions."""

    latents: Tensor
    captions: list[str]


class Batches(IterableDataset):
    """Endless batches, drawn and encoded in a process of their own.

    Args:
        sprites: The artwork.
        vae: The encoder.
        seed: Seed of everything random.
        batch_size: Pictures of a batch; fewer of those that are wide, so that all batches cost the same.
        close_up: Single objects that fill the picture, instead of whole scenes.
    """

    def __init__(self, sprites: Sprites, vae: AutoencoderKL, seed: int, batch_size: int, close_up: bool) -> None:
        self.sprites, self.vae, self.seed = sprites, vae, seed
        self.batch_size, self.close_up = batch_size, close_up

    def __iter__(self) -> Iterator[Batch]:
        torch.set_num_threads(1)
        rng = np.random.default_rng(self.seed)
        while True:
            size, number = (CLOSE_UP, CLOSE_UP) if self.close_up else (SIZE, SIZE), self.batch_size
            if not self.close_up and rng.random() < 0.25:
                size, number = WIDE, max(1, number * SIZE // WIDE[0])
            pictures = [scene(rng, self.sprites, size=size) for _ in range(number)]
            yield Batch(encode(self.vae, [one.image for one in pictures]), [one.caption for one in pictures])


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Sequence[Pixels]) -> Tensor:
    """Pictures as means of the VAE's distribution, not scaled. Shape: [pictures, channels, height / 8, width / 8]."""
    pixels = torch.from_numpy(np.stack(list(images))).permute(0, 3, 1, 2).float() / 127.5 - 1
    coder: Any = vae
    with cpu_autocast():
        return coder.encode(pixels).latent_dist.mean.float()
