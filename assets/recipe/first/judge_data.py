"""Images and captions that the judge is trained on: framed objects, cut objects, empty crops and whole scenes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.random import Generator
from torch import Tensor
from torch.utils.data import IterableDataset

from lora_compose.compose.support.precision import cpu_autocast
from recipe.first.world import (
    BASE_CLASSES,
    CONCEPTS,
    HUES,
    PALE,
    PATTERNS,
    SIZE,
    VENDORS,
    Coat,
    Pixels,
    Sprites,
    article,
    background,
    dress,
    place,
    squares,
)

SIDE = 48  # pixels of the judge's input
CLASSES_IN_BATCH, COATS_IN_BATCH, VIEWS = 9, 4, 2
PARTS, EMPTY, SCENES = 12, 8, 14
RECODED = 16  # images of a batch that go through the VAE
NOTHING = "nothing"
COLOURS = {hue: name for name, hue in HUES.items()} | {PALE: "white"}


@dataclass(frozen=True)
class Label:
    """What is in an image, or what a caption says; None is left open.

    Attributes:
        kind: "whole", "part", "nothing" or "scene".
        name: The class.
        vendor: The artwork it is from.
        coat: Its coat; None is the drawing without one.
        place: Words of the background.
        text: The caption of a scene, which has nothing else.
    """

    kind: str
    name: str = ""
    vendor: str = ""
    coat: Coat | None = None
    place: str = ""
    text: str = ""

    @property
    def identity(self) -> tuple:
        """The key that images of the same object share."""
        return self.name, self.vendor, self.coat

    @property
    def colours(self) -> tuple[str, ...]:
        """Names of the coat's colours."""
        if self.coat is None:
            return ()
        return tuple(
            COLOURS[hue] for hue in ((self.coat.hue, self.coat.second) if self.coat.pattern else self.coat[1:2])
        )


class Caption(NamedTuple):
    """A sentence and what it claims; empty claims are open."""

    text: str
    kind: str
    name: str = ""
    colours: tuple[str, ...] = ()
    pattern: str = ""
    place: str = ""

    def true_of(self, label: Label) -> bool:
        """Whether the sentence is right about an image."""
        if self.kind == "scene" or label.kind == "scene":
            return self.text == label.text
        pattern = label.coat.pattern or "" if label.coat else ""
        return (
            self.kind == label.kind
            and self.name == label.name
            and set(self.colours) <= set(label.colours)
            and self.pattern in ("", pattern)
            and self.place in ("", label.place)
        )


def describe(rng: Generator, label: Label) -> Caption:
    """A random sentence that is right about an image; half of the time it names the full identity."""
    if label.kind == "scene":
        return Caption(label.text, "scene")
    where = label.place if rng.random() < 0.2 else ""
    if label.kind == "nothing":
        return Caption(f"{NOTHING} {where}".strip(), "nothing", place=where)
    if label.kind == "part":
        return Caption(f"a part of {article(label.name)}", "part", label.name)
    colours, pattern = label.colours, (label.coat.pattern or "") if label.coat else ""
    chosen = rng.random()
    if chosen < 0.3:
        colours, pattern = (), ""
    elif chosen < 0.4:
        pattern = ""
    elif chosen < 0.5:
        colours = ()
    words = " ".join(word for word in (" and ".join(colours), PATTERNS.get(pattern, ""), label.name) if word)
    return Caption(f"{article(words)} {where}".strip(), "whole", label.name, colours, pattern, where)


def is_held_out(name: str, vendor: str, coat: Coat | None) -> bool:
    """Whether this is a concept's coat, which the judge must not have seen; objects as they were drawn it may see."""
    worn = {(known.class_word, known.artist, known.coat) for known in CONCEPTS.values() if known.coat}
    return (name, vendor, coat) in worn


def random_coat(rng: Generator) -> Coat | None:
    """A fifth as drawn, a quarter in one colour, the rest patterned, a third of those with white."""
    hues = list(HUES.values())
    chosen = rng.random()
    if chosen < 0.2:
        return None
    first, second = (hues[i] for i in rng.choice(len(hues), 2, replace=False))
    if chosen < 0.45:
        return Coat(None, first)
    return Coat(list(PATTERNS)[rng.integers(len(PATTERNS))], first, PALE if rng.random() < 0.33 else second)


class Artist:
    """Draws crops and scenes. Backgrounds are drawn once and reused."""

    def __init__(self, sprites: Sprites, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.sprites = sprites
        self.names = sorted({key.partition("/")[0] for key in sprites})
        # The world of the base model counts more.
        self._shares = np.array([3.0 if name in BASE_CLASSES else 1.0 for name in self.names])
        self._shares /= self._shares.sum()
        self._backgrounds = [background(self.rng) for _ in range(400)]

    def identities(self) -> list[Label]:
        """Some classes in the same few coats: neighbours differ in class or coat alone."""
        rng, coats = self.rng, []
        while len(coats) < COATS_IN_BATCH:
            coat = random_coat(self.rng)
            if coat not in coats:
                coats.append(coat)
        names = rng.choice(self.names, CLASSES_IN_BATCH, replace=False, p=self._shares)
        vendors = [VENDORS[rng.choice(4, p=(0.55, 0.15, 0.15, 0.15))] for _ in names]
        found = [
            Label("whole", name, vendor, coat) for name, vendor in zip(names, vendors, strict=True) for coat in coats
        ]
        return [label for label in found if not is_held_out(*label.identity)]

    def view(self, label: Label) -> tuple[Pixels, Label]:
        """A crop around the object, often with something else at its edge. Shape: [SIDE, SIDE, 3]."""
        rng = self.rng
        side = int(rng.integers(36, 84))
        if label.kind == "part":
            offset = rng.uniform(0.4, 0.75, 2) * rng.choice((-1, 1), 2) * (rng.permutation((1, rng.random())))
            window = int(side * rng.uniform(0.8, 1.3))
            if rng.random() < 0.35:  # a small part, enlarged
                window, offset = int(side * rng.uniform(0.3, 0.5)), rng.uniform(-0.25, 0.25, 2)
        else:
            window = int(side * rng.uniform(0.95, 1.45))
            offset = rng.uniform(-0.12, 0.12, 2)
        image, where = self._canvas(window)
        left, top = (int((window - side) / 2 + shift * side) for shift in offset)
        if rng.random() < 0.4:
            self._companion(image, (left, top, side))
        if label.kind != "nothing":
            place(image, self._drawn(label), (left, top, side), rng.random() < 0.5)
        return self._worn(image), replace(label, place=where)

    def scene(self) -> tuple[Pixels, Label]:
        """A whole image, one to three objects, made small."""
        rng = self.rng
        image, where = self._canvas(SIZE)
        count = int(rng.choice([1, 2, 3], p=[0.35, 0.5, 0.15]))
        words = []
        names = rng.choice(self.names, count, replace=False, p=self._shares)
        for name, square in zip(names, squares(rng, count), strict=True):
            label = Label("whole", str(name), VENDORS[rng.choice(4, p=(0.7, 0.1, 0.1, 0.1))], random_coat(rng))
            coated = label if rng.random() < 0.5 and not is_held_out(*label.identity) else replace(label, coat=None)
            place(image, self._drawn(coated), square, rng.random() < 0.5)
            words.append(describe(rng, coated).text.removesuffix(" "))
        rng.shuffle(words)
        text = " and ".join(words) + (f" {where}" if rng.random() < 0.8 else "")
        return self._worn(image), Label("scene", text=text)

    def _drawn(self, label: Label) -> Pixels:
        sprite = self.sprites[f"{label.name}/{label.vendor}"]
        if label.coat is None:
            return sprite
        rng = self.rng
        coat = label.coat._replace(hue=_near(rng, label.coat.hue), second=_near(rng, label.coat.second))
        stretch = rng.uniform(0.8, 1.2)
        return dress(sprite, coat, floor=int(rng.integers(90, 190)), stretch=stretch, shift=int(rng.integers(0, 28)))

    def _canvas(self, window: int) -> tuple[np.ndarray, str]:
        rng = self.rng
        image, where = self._backgrounds[rng.integers(len(self._backgrounds))]
        y, x = rng.integers(0, SIZE - min(window, SIZE) + 1, 2)
        crop = image[y : y + window, x : x + window]
        return (crop.copy() if crop.shape[0] == window else cv2.resize(crop, (window, window))), where

    def _companion(self, image: np.ndarray, square: tuple[int, int, int]) -> None:
        """Another object whose edge comes into the crop."""
        rng, (left, top, side) = self.rng, square
        name = self.names[rng.choice(len(self.names), p=self._shares)]
        other = Label("whole", name, VENDORS[rng.choice(4, p=(0.7, 0.1, 0.1, 0.1))], random_coat(rng))
        if is_held_out(*other.identity):
            return
        size = int(rng.integers(36, 84))
        along = int(rng.integers(-size // 2, side))
        across = int(rng.choice((-size, side)) + rng.integers(-side // 6, side // 6 + 1))
        x, y = (left + across, top + along) if rng.random() < 0.75 else (left + along, top + across)
        place(image, self._drawn(other), (x, y, size), rng.random() < 0.5)

    def _worn(self, image: np.ndarray) -> Pixels:
        """Artefacts of a small model: blur, bent outlines, other colours, noise."""
        rng = self.rng
        image = cv2.resize(image.clip(0, 255).astype("f4"), (SIDE, SIDE), interpolation=cv2.INTER_AREA)
        if rng.random() < 0.5:
            field = cv2.resize(rng.normal(0, 1, (5, 5, 2)).astype("f4"), (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
            ys, xs = np.mgrid[:SIDE, :SIDE].astype("f4")
            bend = field * rng.uniform(0.5, 2.5)
            image = cv2.remap(
                image, xs + bend[..., 0], ys + bend[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT
            )
        if rng.random() < 0.5:
            image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 1.4))
        if rng.random() < 0.7:
            image = (image - 128) * rng.uniform(0.8, 1.15) + 128 + rng.normal(0, 8) + rng.normal(0, 4, 3)
        if rng.random() < 0.3:
            image = image + rng.normal(0, rng.uniform(2, 9), image.shape)
        return image.clip(0, 255).astype("u1")


def _near(rng: Generator, hue: int) -> int:
    return hue if hue == PALE else int(hue + rng.integers(-3, 4)) % 180


class Batch(NamedTuple):
    """A training batch.

    Attributes:
        pixels: Shape: [images, 3, SIDE, SIDE], -1 to 1.
        captions: One per image.
        truth: 1 where a caption (column) is right about an image (row). Shape: [images, images].
        identity: Number of the identity by image; -1 where there is none to learn. Shape: [images].
        name: Number of the right one of `names`; -1 for scenes. Shape: [images].
    """

    pixels: Tensor
    captions: list[str]
    truth: Tensor
    identity: Tensor
    name: Tensor


def names(classes: Sequence[str]) -> list[str]:
    """All names of a crop: every class whole, every class in part, nothing."""
    whole = [article(name) for name in classes]
    return [*whole, *(f"a part of {name}" for name in whole), NOTHING]


def name_of(label: Label, classes: Sequence[str]) -> int:
    """The index of a crop's name in `names`."""
    if label.kind == "scene":
        return -1
    return (
        {"whole": 0, "part": len(classes)}[label.kind] + classes.index(label.name) if label.name else 2 * len(classes)
    )


class Batches(IterableDataset):
    """Endless batches.

    Args:
        sprites: The artwork.
        seed: Seed of everything random.
        vae: Encodes and decodes some images of every batch, for its artefacts.
    """

    def __init__(self, sprites: Sprites, seed: int, vae: AutoencoderKL | None) -> None:
        self.sprites, self.seed, self.vae = sprites, seed, vae

    def __iter__(self) -> Iterator[Batch]:
        torch.set_num_threads(1)
        artist = Artist(self.sprites, self.seed)
        while True:
            yield self._batch(artist)

    def _batch(self, artist: Artist) -> Batch:
        rng, labels = artist.rng, artist.identities()
        pictures = [artist.view(label) for label in labels for _ in range(VIEWS)]
        others = [labels[i] for i in rng.choice(len(labels), PARTS + EMPTY)]
        pictures += [artist.view(replace(label, kind="part")) for label in others[:PARTS]]
        pictures += [artist.view(Label("nothing")) for _ in range(EMPTY)]
        pictures += [artist.scene() for _ in range(SCENES)]
        captions = [describe(rng, label) for _, label in pictures]
        truth = torch.tensor([[caption.true_of(label) for caption in captions] for _, label in pictures]).float()
        number = {label.identity: i for i, label in enumerate(labels)}
        identity = [number[label.identity] if label.kind == "whole" else -1 for _, label in pictures]
        pixels = to_pixels([image for image, _ in pictures])
        if self.vae is not None:
            some = torch.from_numpy(rng.choice(len(pixels), RECODED, replace=False))
            pixels[some] = _recoded(self.vae, pixels[some])
        name = [name_of(label, artist.names) for _, label in pictures]
        return Batch(pixels, [caption.text for caption in captions], truth, torch.tensor(identity), torch.tensor(name))


@torch.no_grad()
def _recoded(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Images encoded and decoded by the playground's VAE."""
    with cpu_autocast():
        coder: Any = vae
        return coder.decode(coder.encode(pixels).latent_dist.mean).sample.float().clamp(-1, 1)


def to_pixels(images: list[Pixels]) -> Tensor:
    """Images as the judge takes them. Shape: [images, 3, height, width], -1 to 1."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
