"""Images and captions that the judge is trained on: framed objects, cut objects, empty crops and whole scenes.

Every batch shows characters next to what is nearly one: the same drawing in other colours or without its hat, an
object of its class by the artist of the base world, and halves of two characters in one. A judge of identity has to
tell them apart.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor
from torch.utils.data import IterableDataset

from lora_compose.compose.support.precision import cpu_autocast
from recipe.scenes import scene
from recipe.vae import as_tensor
from recipe.world import (
    CHARACTERS,
    CLASSES,
    COATS,
    SIZE,
    Drawings,
    Pixels,
    article,
    background,
    look,
    place,
    recoloured,
)

SIDE = 64  # pixels of the judge's input
SHOWN, BASE, OTHERS, VIEWS = 5, 12, 8, 2  # characters, base objects and other drawings in a batch; views of each
PARTS, EMPTY, SCENES = 12, 8, 14
RECODED = 16  # images of a batch that go through the VAE
NOTHING = "nothing"
NAMES = [*(article(name) for name in CLASSES), *(f"a part of {article(name)}" for name in CLASSES), NOTHING]
"""All names of a crop."""


@dataclass(frozen=True)
class Thing:
    """What is in a crop.

    Attributes:
        sprite: Its drawing; None for a crop without an object. Shape: [side, side, 4].
        identity: The key that images of the same object share; None where there is none to learn.
        name: Its class; "" for drawings that are of no class of the world.
        words: What captions may call it, without article: "gray cat".
        part: Whether only a part of it is seen.
    """

    sprite: Pixels | None = None
    identity: Hashable | None = None
    name: str = ""
    words: tuple[str, ...] = ()
    part: bool = False

    @property
    def label(self) -> int:
        """Index of its name in `NAMES`; -1 if it has none."""
        if self.sprite is None:
            return len(NAMES) - 1
        return CLASSES.index(self.name) + self.part * len(CLASSES) if self.name else -1

    def caption(self, rng: Generator) -> str:
        """A sentence that is right about it; "" if there is none."""
        if self.sprite is None:
            return NOTHING
        if not self.name:
            return ""
        return f"a part of {article(self.name)}" if self.part else article(self.words[rng.integers(len(self.words))])

    def fits(self, caption: str) -> bool:
        """Whether a sentence is right about it."""
        if self.sprite is None or self.part or not self.name:
            return bool(caption) and caption == self.caption(np.random.default_rng(0))
        return caption in map(article, self.words)


class Artist:
    """Draws crops. Backgrounds are drawn once and reused.

    Args:
        drawings: The artwork.
        seed: Seed of everything random.
    """

    def __init__(self, drawings: Drawings, seed: int) -> None:
        self.rng, self.drawings = np.random.default_rng(seed), drawings
        self._others = [name for name in drawings if name.startswith("other:")]
        self._characters = {name: known.drawn(drawings) for name, known in CHARACTERS.items()}
        self._backgrounds = [background(self.rng)[0] for _ in range(300)]

    def things(self) -> list[Thing]:
        """The objects of a batch."""
        rng = self.rng
        shown = [str(name) for name in rng.choice(list(CHARACTERS), SHOWN, replace=False)]
        near = [thing for name in shown for thing in self._near(name)]
        base = [self._base(str(name)) for name in rng.choice(CLASSES, BASE)]
        others = [
            Thing(self.drawings[self._others[i]], self._others[i])
            for i in rng.choice(len(self._others), min(OTHERS, len(self._others)), replace=False)
        ]
        once = {thing.identity: thing for thing in [*map(self.character, shown), *near, *base, *others]}
        return list(once.values())

    def character(self, name: str) -> Thing:
        """A character."""
        word = CHARACTERS[name].class_word
        return Thing(self._characters[name], name, word, (word,))

    def _near(self, name: str) -> list[Thing]:
        """A plain object of its class, and two of: other colours, without its hat, halves of two characters."""
        rng, known = self.rng, CHARACTERS[name]
        word, sprite = known.class_word, self._characters[name]
        coat, turn = str(rng.choice(list(COATS))), int(rng.choice((30, 60, 90, 120, 150)))
        other = str(rng.choice([each for each in CHARACTERS if each != name]))
        same = CHARACTERS[other].class_word == word
        choices = [
            Thing(turned(sprite, turn), (name, turn), word, (word,)),
            Thing(halves(sprite, self._characters[other]), (name, other), word if same else "", (word,)),
        ]
        if coat != known.coat:
            choices.append(Thing(recoloured(sprite, coat), (name, coat), word, (word,)))
        if known.wears:
            bare = known._replace(wears=(), room=0.0).drawn(self.drawings)
            choices.append(Thing(bare, (name, "bare"), word, (word,)))
        return [self._base(word), *(choices[i] for i in rng.choice(len(choices), 2, replace=False))]

    def _base(self, name: str) -> Thing:
        drawn = look(self.rng, self.drawings, name)
        # People with one caption have several skin tones; the mean colour keeps their identities apart.
        tone = tuple((drawn.sprite[..., :3][drawn.sprite[..., 3] > 200].mean(0) // 8).astype(int).tolist())
        return Thing(drawn.sprite, (drawn.words, tone), name, tuple(dict.fromkeys((name, drawn.words))))

    def view(self, thing: Thing) -> Pixels:
        """A crop around an object, often with something else at its edge. Shape: [SIDE, SIDE, 3]."""
        rng = self.rng
        side = int(rng.integers(56, 128))
        if thing.part:
            offset = rng.uniform(0.4, 0.75, 2) * rng.choice((-1, 1), 2) * (rng.permutation((1, rng.random())))
            window = int(side * rng.uniform(0.8, 1.3))
            if rng.random() < 0.35:  # a small part, enlarged
                window, offset = int(side * rng.uniform(0.3, 0.5)), rng.uniform(-0.25, 0.25, 2)
        else:
            window, offset = int(side * rng.uniform(0.95, 1.45)), rng.uniform(-0.12, 0.12, 2)
        image = self._canvas(window)
        left, top = (int((window - side) / 2 + shift * side) for shift in offset)
        if rng.random() < 0.4:
            self._companion(image, (left, top, side))
        if thing.sprite is not None:
            place(image, thing.sprite, (left, top, side), rng.random() < 0.5)
        return worn(rng, image)

    def _canvas(self, window: int) -> np.ndarray:
        rng = self.rng
        image = self._backgrounds[rng.integers(len(self._backgrounds))]
        y, x = rng.integers(0, SIZE - min(window, SIZE) + 1, 2)
        crop = image[y : y + window, x : x + window]
        return crop.copy() if crop.shape[0] == window else cv2.resize(crop, (window, window))

    def _companion(self, image: np.ndarray, square: tuple[int, int, int]) -> None:
        """Another object whose edge comes into the crop."""
        rng, (left, top, side) = self.rng, square
        name = str(rng.choice(CLASSES))
        sprite = look(rng, self.drawings, name).sprite
        if rng.random() < 0.4:
            sprite = self._characters[str(rng.choice(list(CHARACTERS)))]
        size = int(rng.integers(56, 128))
        along = int(rng.integers(-size // 2, side))
        across = int(rng.choice((-size, side)) + rng.integers(-side // 6, side // 6 + 1))
        x, y = (left + across, top + along) if rng.random() < 0.75 else (left + along, top + across)
        place(image, sprite, (x, y, size), rng.random() < 0.5)


def turned(sprite: Pixels, degrees: int) -> Pixels:
    """A drawing whose colours have other hues; greys stay. `degrees` are OpenCV's, of 180."""
    hsv = cv2.cvtColor(np.ascontiguousarray(sprite[..., :3]), cv2.COLOR_RGB2HSV)
    hsv[..., 0] = (hsv[..., 0].astype(int) + degrees) % 180
    return np.concatenate([cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB).astype("u1"), sprite[..., 3:]], 2)


def halves(left: Pixels, right: Pixels) -> Pixels:
    """The left half of one drawing beside the right half of another."""
    middle = left.shape[1] // 2
    return np.concatenate([left[:, :middle], right[:, middle:]], 1)


def worn(rng: Generator, image: np.ndarray) -> Pixels:
    """An image with the artefacts of a small model: blur, bent outlines, other colours, noise."""
    image = cv2.resize(image.clip(0, 255).astype("f4"), (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    if rng.random() < 0.5:
        field = cv2.resize(rng.normal(0, 1, (5, 5, 2)).astype("f4"), (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
        ys, xs = np.mgrid[:SIDE, :SIDE].astype("f4")
        bend = field * rng.uniform(0.5, 3)
        image = cv2.remap(image, xs + bend[..., 0], ys + bend[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    if rng.random() < 0.5:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 1.6))
    if rng.random() < 0.7:
        image = (image - 128) * rng.uniform(0.8, 1.15) + 128 + rng.normal(0, 8) + rng.normal(0, 4, 3)
    if rng.random() < 0.3:
        image = image + rng.normal(0, rng.uniform(2, 9), image.shape)
    return image.clip(0, 255).astype("u1")


class JudgeBatch(NamedTuple):
    """A training batch.

    Attributes:
        pixels: Shape: [images, 3, SIDE, SIDE], -1 to 1.
        captions: One per image; "" for those without.
        truth: 1 where a caption (column) is right about an image (row). Shape: [images, images].
        identity: Number of the identity by image; -1 where there is none to learn. Shape: [images].
        name: Index in `NAMES`; -1 where there is none. Shape: [images].
    """

    pixels: Tensor
    captions: list[str]
    truth: Tensor
    identity: Tensor
    name: Tensor


class JudgeBatches(IterableDataset):
    """Endless batches.

    Args:
        drawings: The artwork.
        seed: Seed of everything random.
        vae: Encodes and decodes some images of every batch, for its artefacts.
    """

    def __init__(self, drawings: Drawings, seed: int, vae: Any) -> None:
        self.drawings, self.seed, self.vae = drawings, seed, vae

    def __iter__(self) -> Iterator[JudgeBatch]:
        torch.set_num_threads(1)
        artist = Artist(self.drawings, self.seed)
        while True:
            yield self._batch(artist)

    def _batch(self, artist: Artist) -> JudgeBatch:
        rng, things = artist.rng, artist.things()
        named = [thing for thing in things if thing.name]
        cut = [replace(named[i], part=True, identity=None) for i in rng.choice(len(named), PARTS)]
        crops = [thing for thing in things for _ in range(VIEWS)] + cut + [Thing()] * EMPTY
        scenes = [scene(rng, self.drawings) for _ in range(SCENES)]
        images = [artist.view(thing) for thing in crops] + [worn(rng, each.image) for each in scenes]
        captions = [thing.caption(rng) for thing in crops] + [each.caption for each in scenes]
        return JudgeBatch(
            self._recoded(rng, as_tensor(np.stack(images))), captions, _truth(crops, captions),
            *_numbers(crops, len(scenes)),
        )  # fmt: skip

    @torch.no_grad()
    def _recoded(self, rng: Generator, pixels: Tensor) -> Tensor:
        """Some of the images encoded and decoded by the VAE."""
        some = torch.from_numpy(rng.choice(len(pixels), RECODED, replace=False))
        with cpu_autocast():
            decoded = self.vae.decode(self.vae.encode(pixels[some]).latent_dist.mean).sample
        pixels[some] = decoded.float().clamp(-1, 1)
        return pixels


def _truth(crops: Sequence[Thing], captions: Sequence[str]) -> Tensor:
    """The matrix of matches between images and captions; the caption of a scene matches its own image only."""
    truth = torch.zeros(len(captions), len(captions))
    for i, thing in enumerate(crops):
        truth[i, : len(crops)] = torch.tensor([thing.fits(caption) for caption in captions[: len(crops)]]).float()
    for i in range(len(crops), len(captions)):
        truth[i, i] = 1
    return truth


def _numbers(crops: Sequence[Thing], scenes: int) -> tuple[Tensor, Tensor]:
    """Numbers of identities and of names."""
    known = {identity: i for i, identity in enumerate(dict.fromkeys(thing.identity for thing in crops))}
    identity = [-1 if thing.identity is None else known[thing.identity] for thing in crops]
    return torch.tensor(identity + [-1] * scenes), torch.tensor([thing.label for thing in crops] + [-1] * scenes)
