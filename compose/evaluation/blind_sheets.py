"""Blind votes on the images of an evaluation: the same scenes and seeds of some methods, shuffled.

`lora-compose blind from` writes the sheets, `votes.csv` and `key.json` that `lora-compose blind score` reads, and
`images.json`, by which `lora-compose blind follow` finds the images in the evaluation.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from lora_compose.compose.evaluation.blind import COLUMNS, ROWS, vote_sheet, write_key
from lora_compose.compose.evaluation.scoring import reference_files
from lora_compose.compose.evaluation.table import Evaluation, load
from lora_compose.compose.files.images import read_pixels
from lora_compose.compose.files.reading import read_whole
from lora_compose.pipelines.support.spelling import did_you_mean

FILES = "images.json"


@dataclass(frozen=True)
class Shown:
    """An image of an evaluation on a sheet: its method's row in the table, the two subjects, and its file."""

    method: str
    concepts: tuple[str, ...]
    file: str


def make_from(folder: Path, out: Path, methods: Sequence[str], images: int) -> None:
    """Shuffles images of two subjects of some rows of an evaluation and writes sheets and the files of votes.

    Raises:
        ValueError: If a method is not in the evaluation, or there are too few images that all of them made.
    """
    evaluation = load(folder)
    known = [method.name for method in evaluation.suite.compared]
    for method in methods:
        if method not in known:
            raise ValueError(
                f"the evaluation in {folder} has no method {method!r}; it has {', '.join(known)}"
                f"{did_you_mean(method, known)}"
            )
    shown = dict(enumerate(_chosen(evaluation, methods, images), start=1))
    out.mkdir(parents=True, exist_ok=True)
    for page, start in enumerate(range(1, len(shown) + 1, COLUMNS * ROWS)):
        part = {number: shown[number] for number in range(start, min(start + COLUMNS * ROWS, len(shown) + 1))}
        _sheet(evaluation, folder, part).save(out / f"{page}.png")
    write_key(out, {number: image.method for number, image in shown.items()})
    (out / FILES).write_text(json.dumps({number: image.file for number, image in shown.items()}, indent=1))


def read_files(out: Path) -> dict[str, str]:
    """The file of each voted image, relative to the folder of the evaluation, by number.

    Raises:
        FileError: If the votes are not on images of an evaluation.
    """
    return json.loads(read_whole(out / FILES))


def _chosen(evaluation: Evaluation, methods: Sequence[str], images: int) -> list[Shown]:
    """Equal scenes and seeds of each method, spread over the scenes; neighbours on a sheet have the same scene."""
    table = evaluation.images
    keys = zip(table["scene"], table["arm"], table["seed"], strict=True)
    files: dict[tuple[str, str, int], str] = dict(zip(keys, table["file"], strict=True))
    by_scene = {
        scene.name: _of_all(files, scene.name, methods) for scene in evaluation.suite.scenes if len(scene.concepts) == 2
    }
    # Seed by seed, so that any number of images is spread over the scenes.
    turns = max((len(seeds) for seeds in by_scene.values()), default=0)
    places = [(scene, seeds[turn]) for turn in range(turns) for scene, seeds in by_scene.items() if turn < len(seeds)]
    if len(places) < images:
        raise ValueError(f"all of {', '.join(methods)} have made {len(places)} images of two subjects, not {images}")
    chosen: list[Shown] = []
    for scene in evaluation.suite.scenes:
        of_scene = [
            Shown(method, scene.concepts, files[name, method, seed])
            for name, seed in places[:images]
            if name == scene.name
            for method in methods
        ]
        random.Random(scene.name).shuffle(of_scene)
        chosen += of_scene
    return chosen


def _of_all(files: Mapping[tuple[str, str, int], str], scene: str, methods: Sequence[str]) -> list[int]:
    """The seeds of a scene that every method has made."""
    by_method = [{seed for name, arm, seed in files if (name, arm) == (scene, method)} for method in methods]
    return sorted(set.intersection(*by_method))


def _sheet(evaluation: Evaluation, folder: Path, images: Mapping[int, Shown]) -> Image.Image:
    """References of the subjects on the sheet, and numbered images below."""
    names = dict.fromkeys(name for shown in images.values() for name in shown.concepts)
    return vote_sheet(
        [(name, read_pixels(reference_files(evaluation.suite.concept(name))[0])) for name in names],
        [(f"{n}: {' and '.join(shown.concepts)}", read_pixels(folder / shown.file)) for n, shown in images.items()],
    )
