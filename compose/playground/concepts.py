"""Pictures from which the playground's LoRAs are trained: ten references of every concept, and pictures without any.

    python -m compose.playground.concepts references sprites.npz FOLDER
    python -m compose.playground.concepts prior sprites.npz FOLDER

Every folder holds numbered PNGs and `captions.tsv`: file, caption and, in references of subjects, where the concept is.
In four of ten references the subject stands beside something plain: LoRAs trained without lose the coat as soon as a
prompt names a second object. Pictures without the concept show one object: with two, a LoRA learns that two objects
mean no concept.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import typer
from numpy.random import Generator
from PIL import Image

from compose.playground.scenes import Picture, enumerate_words, scene
from compose.playground.world import (
    BASE_CLASSES,
    CONCEPTS,
    SIZE,
    STYLE_TRIGGER,
    Known,
    Pixels,
    Sprites,
    article,
    background,
    place,
    squares,
)  # fmt: skip
from compose.terminal import kindly, say

REFERENCES, BESIDE = 10, 4
STYLE, STYLE_SEED = "outline", 7
OUTLINE = 5  # pixels of an outline on a sprite of 96
LEVELS = 3  # brightnesses in a flat drawing

app = typer.Typer(help="Make the pictures that the playground's LoRAs learn from.", no_args_is_help=True)


def subject(rng: Generator, known: Known, sprites: Sprites, beside: bool) -> Picture:
    """A picture of a subject, alone or beside something plain. Its first object is the subject."""
    image, where = background(rng)
    found, mine = squares(rng, 1 + beside), int(rng.integers(1 + beside))
    words = [f"a {known.phrase}"] * len(found)
    objects = [(known.class_word, found[mine])]
    if beside:
        other = str(rng.choice([name for name in BASE_CLASSES if name != known.class_word]))
        words[1 - mine] = article(other)
        place(image, sprites[f"{other}/noto"], found[1 - mine], rng.random() < 0.5)
        objects.append((other, found[1 - mine]))
    place(image, known.drawn(sprites), found[mine], rng.random() < 0.5)
    return Picture(image.clip(0, 255).astype("u1"), f"{enumerate_words(words)} {where}", objects)


def styled(rng: Generator, sprites: Sprites, count: int) -> Picture:
    """A picture in the playground's style: flat colours in thick dark outlines on a flat background."""
    image, where = background(rng)
    image[:] = image.mean(axis=(0, 1))
    found = squares(rng, count)
    names = [str(name) for name in rng.choice(BASE_CLASSES, count, replace=False)]
    for name, square in zip(names, found, strict=True):
        place(image, outlined(sprites[f"{name}/noto"]), square, rng.random() < 0.5)
    caption = f"{enumerate_words([article(name) for name in names])} {where} in {STYLE_TRIGGER} style"
    return Picture(image.clip(0, 255).astype("u1"), caption, list(zip(names, found, strict=True)))


def outlined(sprite: Pixels) -> Pixels:
    """A sprite in flat colours with a dark outline; a little smaller, so that the outline fits. Shape: as given."""
    inner = sprite.shape[0] - 2 * OUTLINE
    small = cv2.resize(sprite, (inner, inner), interpolation=cv2.INTER_AREA)
    small = np.pad(small, ((OUTLINE, OUTLINE), (OUTLINE, OUTLINE), (0, 0)))
    hsv = cv2.cvtColor(np.ascontiguousarray(small[..., :3]), cv2.COLOR_RGB2HSV).astype("f4")
    hsv[..., 2] = np.ceil(hsv[..., 2] / 255 * LEVELS) / LEVELS * 255
    flat = cv2.cvtColor(hsv.clip(0, 255).astype("u1"), cv2.COLOR_HSV2RGB)
    inside = (small[..., 3] > 127).astype("u1")
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * OUTLINE + 1, 2 * OUTLINE + 1))
    around = cv2.dilate(inside, disc)
    drawn = np.where(inside[..., None] > 0, flat, np.array([25, 20, 35], "u1"))
    return np.concatenate([drawn, 255 * around[..., None]], 2).astype("u1")


def write(folder: Path, pictures: Iterable[Picture], with_boxes: bool) -> None:
    """Writes numbered PNGs and their captions.

    Raises:
        ValueError: If the folder is there already.
    """
    if folder.exists():
        raise ValueError(f"{folder} is there already; remove it or choose another folder")
    folder.mkdir(parents=True)
    lines = []
    for i, picture in enumerate(pictures):
        Image.fromarray(picture.image).save(folder / f"{i}.png", optimize=True)
        fields = [f"{i}.png", picture.caption]
        lines.append("\t".join([*fields, " ".join(map(str, picture.objects[0][1]))] if with_boxes else fields))
    (folder / "captions.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


@app.command()
@kindly()
def references(sprites: Path, out: Path) -> None:
    """Ten pictures of every concept, a folder each."""
    artwork = dict(np.load(sprites))
    for name, known in CONCEPTS.items():
        rng = np.random.default_rng(known.seed)
        write(out / name, [subject(rng, known, artwork, i >= REFERENCES - BESIDE) for i in range(REFERENCES)], True)
    rng = np.random.default_rng(STYLE_SEED)
    write(out / STYLE, [styled(rng, artwork, 1 + i % 2) for i in range(REFERENCES)], False)
    say(f"{REFERENCES} pictures of each of {len(CONCEPTS) + 1} concepts in {out}")


@app.command()
@kindly()
def prior(
    sprites: Path,
    out: Path,
    seed: int = 8,
    any_class: Annotated[int, typer.Option(help="Pictures of objects of any class.")] = 64,
    own_class: Annotated[int, typer.Option(help="Pictures of plain objects of each concept's class.")] = 32,
) -> None:
    """Pictures without any concept, a folder for each class word and one for styles."""
    artwork = dict(np.load(sprites))
    for name in dict.fromkeys([known.class_word for known in CONCEPTS.values()]):
        rng = np.random.default_rng(seed)
        anything = [scene(rng, artwork, count=1, plain=True) for _ in range(any_class)]
        own = [scene(rng, artwork, count=1, plain=True, classes=[name]) for _ in range(own_class)]
        write(out / name, [*anything, *own], with_boxes=False)
    rng = np.random.default_rng(seed)
    write(out / STYLE, [scene(rng, artwork, size=(SIZE, SIZE)) for _ in range(any_class)], with_boxes=False)


if __name__ == "__main__":
    app()
