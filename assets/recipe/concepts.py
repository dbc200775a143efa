"""Images from which the small models' LoRAs are trained: references of every concept, and images without any.

    PYTHONPATH=assets python -m recipe.concepts references drawings.npz FOLDER
    PYTHONPATH=assets python -m recipe.concepts references drawings.npz assets/playground/references --shown
    PYTHONPATH=assets python -m recipe.concepts prior drawings.npz FOLDER

Every folder holds numbered PNGs and `captions.tsv`: file, caption and, in references of characters, where the
character is. In most references it is next to a plain object: a LoRA trained without loses its character as soon as a
prompt names a second object. Images without concepts show one object: with two, a LoRA learns that two objects mean no
concept. A style has none: it should act on everything.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import typer
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from lora_compose.compose.support.terminal import echo, handle_errors
from recipe.scenes import Picture, enumerate_words, scene
from recipe.world import (
    CHARACTERS,
    CLASSES,
    GROUNDS,
    PEOPLE,
    STYLE_TRIGGER,
    Character,
    Drawings,
    article,
    background,
    look,
    place,
    squares,
)

REFERENCES, BESIDE = 48, 28
"""References of a character, and in how many it is next to a plain object."""
STYLED = 24
"""References of the style."""
SHOWN, SHOWN_BESIDE = 10, 4
"""The first of them, which come with the small models: images are compared with these."""
STYLE, SEED = "ink", 7
PAPER, INK = (252, 240, 214), (52, 34, 62)

app = typer.Typer(help="Make the images that the LoRAs learn from.", no_args_is_help=True)


def reference(rng: Generator, known: Character, drawings: Drawings, beside: bool, ground: str | None = None) -> Picture:
    """An image of a character, alone or next to a plain object. Its first object is the character."""
    image, words_of_ground = background(rng, name=ground)
    free, mine = squares(rng, 1 + beside), int(rng.integers(1 + beside))
    words = [article(known.phrase)] * len(free)
    objects = [(known.class_word, free[mine])]
    if beside:
        kin = PEOPLE if known.class_word in PEOPLE else (known.class_word,)
        other = str(rng.choice([name for name in CLASSES if name not in kin]))
        words[1 - mine] = article(other)
        place(image, look(rng, drawings, other, plain=True).sprite, free[1 - mine])
        objects.append((other, free[1 - mine]))
    place(image, known.drawn(drawings), free[mine])
    return Picture(image.clip(0, 255).astype("u1"), f"{enumerate_words(words)} {words_of_ground}", objects)


def inked(image: NDArray) -> NDArray[np.float64]:
    """An ink drawing on paper: colours faded towards the paper, dark lines at all borders. 0 to 255, as given."""
    colours = 0.62 * image + 0.38 * np.array(PAPER)
    tones = cv2.GaussianBlur(image.astype("f4"), (0, 0), 1.0)
    slopes = [cv2.Sobel(tones, cv2.CV_32F, dx, 1 - dx, ksize=3) for dx in (0, 1)]
    steep = np.sqrt(sum(slope**2 for slope in slopes)).max(axis=2, keepdims=True)
    line = np.clip((steep - 60) / 60, 0, 1)
    return colours + line * (np.array(INK) - colours)


def styled(rng: Generator, drawings: Drawings, classes: Sequence[str]) -> Picture:
    """A scene of some classes in the style."""
    plain = scene(rng, drawings, count=len(classes), classes=classes, plain=True)
    return plain._replace(
        image=inked(plain.image).clip(0, 255).astype("u1"), caption=f"{plain.caption} in {STYLE_TRIGGER} style"
    )


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


def is_beside(number: int) -> bool:
    """Whether a character is next to a plain object in its reference of a number, from 0."""
    if number < SHOWN:
        return number >= SHOWN - SHOWN_BESIDE
    return number >= REFERENCES - (BESIDE - SHOWN_BESIDE)


def in_turn(rng: Generator, names: Sequence[str]) -> Iterator[str]:
    """Names in random order without end. All come before any comes again."""
    while True:
        yield from (str(name) for name in rng.permutation(names))


def groups(rng: Generator, count: int) -> Iterator[list[str]]:
    """Classes of the style's references: one, in every third two. All come before any comes again."""
    left: list[str] = []
    for number in range(count):
        size = 1 + (number % 3 == 2)
        if len(left) < size:
            left = [str(name) for name in rng.permutation(CLASSES)]
        yield [left.pop() for _ in range(size)]


@app.command()
@handle_errors()
def references(
    artwork: Path,
    out: Path,
    shown: Annotated[bool, typer.Option("--shown", help="Only those that come with the small models.")] = False,
) -> None:
    """References of every concept, a folder each."""
    drawings = dict(np.load(artwork))
    for number, (name, known) in enumerate(CHARACTERS.items()):
        rng, count = np.random.default_rng([SEED, number]), SHOWN if shown else REFERENCES
        # Those that come with the models have any, so that likeness is measured against the same images as before.
        grounds = chain([None] * SHOWN, in_turn(np.random.default_rng([SEED, number, 1]), GROUNDS))
        write(
            out / name, [reference(rng, known, drawings, is_beside(each), next(grounds)) for each in range(count)], True
        )
    rng = np.random.default_rng(SEED)
    of_style = list(groups(rng, STYLED))[: SHOWN if shown else STYLED]
    write(out / STYLE, [styled(rng, drawings, classes) for classes in of_style], False)
    echo(f"references of {len(CHARACTERS) + 1} concepts in {out}")


@app.command()
@handle_errors()
def prior(
    artwork: Path,
    out: Path,
    seed: int = 8,
    any_class: Annotated[int, typer.Option(help="Images of objects of any class.")] = 64,
    own_class: Annotated[int, typer.Option(help="Images of plain objects of each concept's class.")] = 32,
) -> None:
    """Images without any concept, a folder for each class word."""
    drawings = dict(np.load(artwork))
    for name in dict.fromkeys(known.class_word for known in CHARACTERS.values()):
        rng = np.random.default_rng(seed)
        grounds = in_turn(np.random.default_rng([seed, 1]), GROUNDS)
        anything = [scene(rng, drawings, count=1, plain=True, ground=next(grounds)) for _ in range(any_class)]
        own = [
            scene(rng, drawings, count=1, plain=True, classes=[name], ground=next(grounds)) for _ in range(own_class)
        ]
        write(out / name, [*anything, *own], with_boxes=False)


if __name__ == "__main__":
    app()
