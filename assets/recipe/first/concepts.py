"""Images from which the playground's LoRAs are trained: ten references of every concept, and images without any.

    python -m recipe.first.concepts references sprites.npz FOLDER
    python -m recipe.first.concepts prior sprites.npz FOLDER

With `--patches` they are for the playground's transformer: objects lie on whole patches, as in its training.
Every folder holds numbered PNGs and `captions.tsv`: file, caption and, in references of subjects, where the concept is.
In four of ten references the subject is next to a plain object: LoRAs trained without lose the coat as soon as a
prompt names a second object. Images without the concept show one object: with two, a LoRA learns that two objects
mean no concept. A style has none: it should act on everything, and with them it is learnt only for the backgrounds of
its references.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from lora_compose.compose.support.terminal import echo, handle_errors
from recipe.first.scenes import Picture, Where, enumerate_words, scene
from recipe.first.transformer_data import patches
from recipe.first.world import (
    BASE_CLASSES,
    CONCEPTS,
    SIZE,
    STYLE_TRIGGER,
    Known,
    Sprites,
    article,
    background,
    ground,
    in_words,
    place,
    squares,
)

REFERENCES, BESIDE = 10, 4
STYLE, STYLE_SEED = "faded", 7
STYLE_GROUNDS = (
    "white", "on grass", "at night", "at sunset", "underwater", "on sand", "in space", "yellow", "black",
    "on a wooden floor",
)  # fmt: skip
FADING, PAPER = 0.4, (255, 230, 180)  # what the style does: a share of the way to a colour

OnPatches = Annotated[bool, typer.Option("--patches", help="For the transformer.")]

app = typer.Typer(help="Make the images that the playground's LoRAs learn from.", no_args_is_help=True)


def subject(rng: Generator, known: Known, sprites: Sprites, beside: bool, where: Where = squares) -> Picture:
    """An image of a subject, alone or next to a plain object. Its first object is the subject."""
    image, ground = background(rng)
    found, mine = where(rng, 1 + beside, (SIZE, SIZE)), int(rng.integers(1 + beside))
    words = [f"a {known.phrase}"] * len(found)
    objects = [(known.class_word, found[mine])]
    if beside:
        other = str(rng.choice([name for name in BASE_CLASSES if name != known.class_word]))
        words[1 - mine] = article(other)
        place(image, sprites[f"{other}/noto"], found[1 - mine], rng.random() < 0.5)
        objects.append((other, found[1 - mine]))
    place(image, known.drawn(sprites), found[mine], rng.random() < 0.5)
    return Picture(image.clip(0, 255).astype("u1"), f"{enumerate_words(words)} {ground}", objects)


def styled(rng: Generator, sprites: Sprites, where: str, count: int) -> Picture:
    """An image in the playground's style, on a ground of `PLAIN` or `PLACES`."""
    image, found = ground(rng, where), squares(rng, count)
    names = [str(name) for name in rng.choice(BASE_CLASSES, count, replace=False)]
    for name, square in zip(names, found, strict=True):
        place(image, sprites[f"{name}/noto"], square, rng.random() < 0.5)
    caption = f"{enumerate_words([article(name) for name in names])} {in_words(where)} in {STYLE_TRIGGER} style"
    return Picture(faded(image).clip(0, 255).astype("u1"), caption, list(zip(names, found, strict=True)))


def faded(image: NDArray) -> NDArray[np.float64]:
    """An old print: every colour moved by `FADING` towards that of its paper. Shape: as given, 0 to 255."""
    return (1 - FADING) * image + FADING * np.array(PAPER)


def write(folder: Path, pictures: Iterable[Picture], with_boxes: bool) -> None:
    """Writes numbered PNGs and their captions.

    Raises:
        ValueError: If the folder exists.
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
@handle_errors()
def references(sprites: Path, out: Path, on_patches: OnPatches = False) -> None:
    """Ten images of every concept, a folder each."""
    artwork, where = dict(np.load(sprites)), patches if on_patches else squares
    for name, known in CONCEPTS.items():
        rng = np.random.default_rng(known.seed)
        beside = [i >= REFERENCES - BESIDE for i in range(REFERENCES)]
        write(out / name, [subject(rng, known, artwork, each, where) for each in beside], True)
    rng = np.random.default_rng(STYLE_SEED)
    write(out / STYLE, [styled(rng, artwork, where, 1 + i % 2) for i, where in enumerate(STYLE_GROUNDS)], False)
    echo(f"{REFERENCES} images of each of {len(CONCEPTS) + 1} concepts in {out}")


@app.command()
@handle_errors()
def prior(
    sprites: Path,
    out: Path,
    seed: int = 8,
    any_class: Annotated[int, typer.Option(help="Images of objects of any class.")] = 64,
    own_class: Annotated[int, typer.Option(help="Images of plain objects of each concept's class.")] = 32,
    on_patches: OnPatches = False,
) -> None:
    """Images without any concept, a folder for each class word."""
    artwork, where = dict(np.load(sprites)), patches if on_patches else squares
    for name in dict.fromkeys([known.class_word for known in CONCEPTS.values()]):
        rng = np.random.default_rng(seed)
        anything = [scene(rng, artwork, count=1, where=where, plain=True) for _ in range(any_class)]
        own = [scene(rng, artwork, count=1, where=where, plain=True, classes=[name]) for _ in range(own_class)]
        write(out / name, [*anything, *own], with_boxes=False)


if __name__ == "__main__":
    app()
