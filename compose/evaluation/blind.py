"""Blind comparison of methods: people vote on images without knowing which method made them.

`lora-compose blind make` generates pairs of playground concepts with several methods, shuffles the images and writes
numbered sheets and a `votes.csv` to fill in; `lora-compose blind score` reads the votes and counts them by method.
"""

import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from lora_compose.compose.batch.tables import read_table
from lora_compose.compose.figures.sheets import Row, sheet
from lora_compose.compose.files.reading import FileError, read_whole
from lora_compose.compose.generate.models import open_model
from lora_compose.compose.playground.assets import PLAYGROUND, playground_lora, playground_references
from lora_compose.compose.support.terminal import bar_over
from lora_compose.pipelines.scene.scene import Concept, Run, Scene

PAIRS = (("cat", "dog"), ("mira", "omar"), ("bear", "robot"))
VERDICTS = {
    "all": "every subject is present, each with its own look and nothing of another's",
    "some": "one or more subjects, but not all, have their own look unmixed",
    "none": "no subject has its own look unmixed",
}
_EARLIER = {"both": "all", "one": "some"}
"""Verdicts on two subjects in files of earlier versions."""
COLUMNS, ROWS, SIDE = 5, 4, 192
KEY, VOTES = "key.json", "votes.csv"
_COLUMNS_OF_VOTES = ("number", "verdict")


@dataclass(frozen=True)
class Way:
    """One way of composing: a method with one kind of LoRAs."""

    method: str
    kind: str

    @property
    def label(self) -> str:
        """The way's name in tables."""
        return f"{self.method}, {self.kind} LoRAs"


WAYS = (Way("merge", "ordinary"), Way("tara", "TARA"), Way("regional", "ordinary"), Way("regional", "TARA"))
HALVES = ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0))


@dataclass(frozen=True)
class BlindImage:
    """One image of a blind test."""

    pair: tuple[str, str]
    way: Way
    seed: int


def numbered(seeds: int) -> dict[int, BlindImage]:
    """All images under the numbers that the sheets show: shuffled, and the same every time."""
    jobs: list[BlindImage] = []
    for pair in PAIRS:
        of_pair = [BlindImage(pair, way, seed) for way, seed in product(WAYS, range(seeds))]
        random.Random(" ".join(pair)).shuffle(of_pair)
        jobs += of_pair
    return dict(enumerate(jobs, start=1))


def make(out: Path, seeds: int) -> None:
    """Generates and shuffles images, of so many seeds, and writes sheets, `votes.csv` and `key.json`.

    Raises:
        ValueError: If the folder has votes on other images.
    """
    jobs = numbered(seeds)
    key = {number: job.way.label for number, job in jobs.items()}
    check_votes(out, {KEY: key})
    out.mkdir(parents=True, exist_ok=True)
    images = generated(jobs, out)
    for pair in PAIRS:
        numbers = [number for number, job in jobs.items() if job.pair == pair]
        for page, start in enumerate(range(0, len(numbers), COLUMNS * ROWS)):
            chosen = [(str(number), images[number]) for number in numbers[start : start + COLUMNS * ROWS]]
            references = [(name, Image.open(path)) for name in pair for path in playground_references(name)[:2]]
            vote_sheet(references, chosen).save(out / f"{pair[0]}-{pair[1]}-{page}.png")
    write_key(out, key)


def check_votes(out: Path, files: Mapping[str, Mapping[int, str]]) -> None:
    """Raises ValueError if a folder has votes on other images than those that `files` will be about, by file name."""
    votes = out / VOTES
    if not votes.exists():
        return
    for path, by_number in ((out / name, by_number) for name, by_number in files.items()):
        if not path.is_file() or path.read_text(encoding="utf-8") != as_json(by_number):
            raise ValueError(
                f"{votes} is about other images; give another folder with --out, or delete it if its votes may be lost"
            )


def as_json(by_number: Mapping[int, str]) -> str:
    """What `key.json` and its like have, by image number."""
    return json.dumps(by_number, indent=1)


def write_key(out: Path, key: Mapping[int, str]) -> None:
    """Writes `key.json`, what made each image by number, and `votes.csv` to be filled in unless there is one."""
    (out / KEY).write_text(as_json(key), encoding="utf-8")
    votes = out / VOTES
    if not votes.exists():
        votes.write_text(f"{','.join(_COLUMNS_OF_VOTES)}\n" + "".join(f"{n},\n" for n in key), encoding="utf-8")
    meaning = "\n".join(f"  [bold]{verdict}[/]: {text}" for verdict, text in VERDICTS.items())
    Console().print(f"Look at the sheets in {out}, write a verdict for every number into {votes}:\n{meaning}")


def score(out: Path) -> None:
    """Counts the votes in a folder by method."""
    key, votes = read_votes(out)
    counts = Counter((key[number], verdict) for number, verdict in votes.items())
    table = Table("way", *VERDICTS, "images", title="Blind test")
    for label in dict.fromkeys(sorted(key.values())):
        row = [counts[label, verdict] for verdict in VERDICTS]
        table.add_row(label, *map(str, row), str(sum(row)))
    Console().print(table)


def read_votes(out: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Method and verdict by image number.

    Raises FileError for files that are no such tables, as spreadsheets write them, and ValueError for other verdicts.
    """
    key, path = json.loads(read_whole(out / KEY)), out / VOTES
    table = read_table(path)
    if missing := [column for column in _COLUMNS_OF_VOTES if column not in (table.columns or ())]:
        raise FileError(f"{path}, line 1: there is no column {missing[0]!r}; expected {','.join(_COLUMNS_OF_VOTES)}")
    if bad := [row for row in table.rows if row.error is not None]:
        raise FileError(f"{path}, line {bad[0].line}: {bad[0].error}")
    given = {row.values["number"].strip(): row.values["verdict"].strip() for row in table.rows}
    votes = {number: _EARLIER.get(verdict) or verdict for number, verdict in given.items()}
    wrong = {number: verdict for number, verdict in votes.items() if verdict not in VERDICTS or number not in key}
    if wrong:
        number, verdict = next(iter(wrong.items()))
        raise ValueError(f"image {number}: expected one of {', '.join(VERDICTS)}, found {verdict!r}")
    return key, votes


def generated(jobs: Mapping[int, BlindImage], out: Path) -> dict[int, Image.Image]:
    """Generates images of a blind test, by number."""
    pipe = open_model(Run(scene=Scene(prompt="-"), model=PLAYGROUND, device="cpu"))
    images = bar_over(f"composing for {out}", jobs.values(), lambda job: generate(pipe, job))
    return dict(zip(jobs, images, strict=True))


def generate(pipe: Any, job: BlindImage) -> Image.Image:
    """Generates an image of a blind test."""
    suffix = "-tara" if job.way.kind == "TARA" else ""
    names = [f"{subject}{suffix}" for subject in job.pair]
    for name in names:
        if name not in pipe.concepts:
            pipe.load_concept(playground_lora(name), name=name)
    first, second = (pipe.concepts[name].phrase for name in names)
    return pipe(
        f"a {first} and a {second} on a white background",
        concepts=[Concept(name=name, region=half) for name, half in zip(names, HALVES, strict=True)],
        method=job.way.method,
        num_inference_steps=25,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(job.seed),
    ).images[0]


def vote_sheet(references: Iterable[tuple[str, Image.Image]], images: Iterable[tuple[str, Image.Image]]) -> Image.Image:
    """A sheet to vote on: what the subjects look like, and captioned images below."""
    rows = []
    for label, tiles in (("reference", list(references)), ("", list(images))):
        for start in range(0, len(tiles), COLUMNS):
            captions, pictures = zip(*tiles[start : start + COLUMNS], strict=True)
            rows.append(Row((), pictures, [f"{label} {caption}".strip() for caption in captions]))
    lines = [f"{verdict}: {text}" for verdict, text in VERDICTS.items()]
    return sheet([()] * COLUMNS, rows, title="Which subjects are right?", lines=lines, side=SIDE)
