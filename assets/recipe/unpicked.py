"""Sheets on which no image is left out: seeds 0 to 19 of plain prompts, each LoRA alone, two, two of one class, three.

python -m recipe.unpicked outputs/unpicked outputs/evaluation/playground-draft
python -m recipe.unpicked outputs/unpicked-flux outputs/evaluation/playground-flux --model playground-flux
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from itertools import product
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from PIL import Image

from lora_compose.compose.evaluation.detectors import Detector, WindowDetector
from lora_compose.compose.evaluation.encoders import JUDGE, load_encoder
from lora_compose.compose.evaluation.votes import Judge
from lora_compose.compose.figures.sheets import Row, sheet
from lora_compose.compose.files.atomic import write_whole
from lora_compose.compose.files.images import png_bytes, read_pixels
from lora_compose.compose.generate.demo import GUIDANCE, STEPS, THREADS
from lora_compose.compose.generate.machine import threads
from lora_compose.compose.playground.assets import PLAYGROUND, playground_lora, playground_model
from lora_compose.compose.support.terminal import bar, echo, handle_errors
from lora_compose.pipelines.families import ComposePipeline
from lora_compose.pipelines.scene.scene import Concept
from recipe.plain import PROMPTS, named
from recipe.suites import HALVES, THIRDS, Place, alone
from recipe.world import CLASSES

BATCH, ACROSS, SIDE = 4, 10, 128
_IN_BOXES = ("regional", "lora-composer")


class Group(StrEnum):
    """What a sheet shows."""

    PLAIN = "plain"
    ALONE = "alone"
    PAIR = "pair"
    ONE_CLASS = "one-class"
    THREE = "three"


class Shown(NamedTuple):
    """Images that differ in their seed only.

    Attributes:
        group: Their sheet.
        prompt: The prompt.
        names: Concepts; none for a plain prompt, whose classes `PROMPTS` has.
        method: How the LoRAs are composed, if there are any.
        suffix: Of the LoRAs' names: "-tara", or nothing.
    """

    group: Group
    prompt: str
    names: tuple[str, ...] = ()
    method: str = "merge"
    suffix: str = ""


METHODS = {
    PLAYGROUND: ["merge", "switch", "composite", "tara", "freefuse", "clora", "draft", "regional", "lora-composer"],
    "playground-flux": ["merge", "switch", "composite", "tara", "freefuse:official-flux", "draft", "regional"],
}
"""All methods of each model; those with a column of the canvas for each concept last."""
FEW = ("merge", "draft", "regional")
PAIR = Place(("cat", "dog"), "on grass")
ONE_CLASS = (Place(("cat", "kitten"), "on grass"), Place(("mira", "lena"), "on a white background"))
THREE = Place(("cat", "dog", "rabbit"), "on a white background")


def everything(model: str) -> Iterator[Shown]:
    """All rows of all sheets of a model."""
    yield from (Shown(Group.PLAIN, prompt) for prompt in PROMPTS)
    yield from (Shown(Group.ALONE, place.prompt, place.names) for place in alone() if len(place.names) == 1)
    for method in METHODS[model]:
        suffix = "-tara" if method == "tara" and model == PLAYGROUND else ""
        yield Shown(Group.PAIR, PAIR.prompt, PAIR.names, method, suffix)
    for group, place in (*((Group.ONE_CLASS, place) for place in ONE_CLASS), (Group.THREE, THREE)):
        yield from (Shown(group, place.prompt, place.names, method) for method in FEW)


def files(out: Path, number: int, shown: Shown, seeds: Sequence[int]) -> list[Path]:
    """Where the images of a row are."""
    return [out / shown.group / f"{number:02}-{seed:02}.png" for seed in seeds]


def make(pipe: Any, model: str, shown: Shown, seeds: Sequence[int], steps: int = STEPS) -> list[Image.Image]:
    """Images of a row, in one batch."""
    concepts = [f"{name}{shown.suffix}" for name in shown.names]
    for name in concepts:
        if name not in pipe.concepts:
            pipe.load_concept(playground_lora(name, model), name)
    columns = {2: HALVES, 3: THIRDS}.get(len(concepts), ()) if shown.method in _IN_BOXES else ()
    composed: dict[str, Any] = {}
    if concepts:
        boxes = columns or [None] * len(concepts)
        composed = {
            "concepts": [Concept(name=name, region=box) for name, box in zip(concepts, boxes, strict=True)],
            "method": shown.method,
        }
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    width, height = pipe.own_size
    return pipe(
        prompt=[shown.prompt] * len(generators), num_inference_steps=steps, width=width, height=height,
        generator=generators, **pipe.guided(GUIDANCE, None), **composed,
    ).images  # fmt: skip


def counted(judge: Judge, detector: Detector, shown: Shown, images: Sequence[Image.Image]) -> str:
    """What the judge says of a row."""
    if not shown.names:
        classes = PROMPTS[shown.prompt]
        right = [named(detector, image, classes) for image in images]
        return f"all named in {sum(each.all for each in right)}, none twice in {sum(each.exactly for each in right)}"
    there = [judge.present(image, shown.prompt, shown.names) for image in images]
    return f"right in {sum(number == len(shown.names) for number in there)} of {len(images)}"


def drawn(rows: Sequence[tuple[Shown, str, Sequence[Image.Image]]], seeds: Sequence[int]) -> Image.Image:
    """A sheet of the rows of a group, ten images in a line, with what the judge says of each row."""
    group = rows[0][0].group
    lines: list[Row] = []
    for shown, verdict, images in rows:
        what = shown.prompt if group in (Group.PLAIN, Group.ALONE) else shown.method
        label = (what, *([] if what == shown.prompt else [shown.prompt]), f"judge: {verdict}")
        for start in range(0, len(images), ACROSS):
            captions = [str(seed) for seed in seeds[start : start + ACROSS]]
            first = start == 0
            lines.append(Row(label if first else (), images[start : start + ACROSS], captions, parted=first))
    return sheet([()] * min(ACROSS, len(seeds)), lines, side=SIDE)


def make_all(
    out: Path,
    model: str,
    groups: Sequence[Group],
    seeds: Sequence[int],
    steps: int,
    on_images: Callable[[int, int], None],
) -> None:
    """Makes what is missing of the images of some sheets."""
    rows = [(number, shown) for number, shown in enumerate(everything(model)) if shown.group in groups]
    batches = [seeds[start : start + BATCH] for start in range(0, len(seeds), BATCH)]
    pipe: Any = ComposePipeline.from_pretrained(playground_model(model), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    done = 0
    for (number, shown), batch in product(rows, batches):
        paths = files(out, number, shown, batch)
        if not all(path.is_file() for path in paths):
            for path, image in zip(paths, make(pipe, model, shown, batch, steps), strict=True):
                write_whole(path, png_bytes(image))
        done += len(batch)
        on_images(done, len(rows) * len(seeds))


@handle_errors(logging.ERROR)
def main(
    out: Annotated[Path, typer.Argument(help="A folder for images and sheets; a rerun makes what is missing.")],
    evaluation: Annotated[Path, typer.Argument(help="A finished evaluation of the model, for the judge's thresholds.")],
    model: Annotated[str, typer.Option(help="playground or playground-flux.")] = PLAYGROUND,
    group: Annotated[list[Group] | None, typer.Option(help="A sheet; several times. Default: all.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many, from 0.")] = 20,
    steps: Annotated[int, typer.Option(min=1)] = STEPS,
) -> None:
    """Makes the images, lets the judge count, and draws a sheet for each group, as WebP."""
    groups, chosen = group or list(Group), list(range(seeds))
    judge = Judge.of(evaluation)
    detector = WindowDetector(load_encoder(JUDGE), CLASSES)
    with bar("making images", 1) as on_progress, threads(THREADS):
        make_all(out, model, groups, chosen, steps, lambda done, total: on_progress(done / total))
    for each in groups:
        rows = []
        for number, shown in enumerate(everything(model)):
            if shown.group is each:
                images = [read_pixels(path) for path in files(out, number, shown, chosen)]
                rows.append((shown, counted(judge, detector, shown, images), images))
                echo(f"{each}: {shown.method if shown.names else ''} {shown.prompt}: {rows[-1][1]}")
        path = out / f"{each}.webp"
        drawn(rows, chosen).save(path, "WEBP", quality=80)
        echo(path)


if __name__ == "__main__":
    typer.run(main)
