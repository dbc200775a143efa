"""Pairs of the playground's LoRAs merged in every way, in plain diffusers: a sheet.

python -m recipe.merging docs/images/merging.png

How much of each LoRA is left is measured by the suites `playground-merged-styles`, `-pairs` and `-bundles`.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import wrap
from typing import Annotated, Any

import diffusers.utils.logging
import torch
import typer
from diffusers import StableDiffusionPipeline
from PIL import Image

from lora_compose.compose.figures.sheets import Row, sheet
from lora_compose.compose.files.images import save_image
from lora_compose.compose.generate.demo import GUIDANCE, THREADS
from lora_compose.compose.generate.machine import threads
from lora_compose.compose.lora.matching import match_files
from lora_compose.compose.lora.merging import Given, merge_files
from lora_compose.compose.playground.assets import playground_lora, playground_model
from lora_compose.compose.support.terminal import bar, echo, handle_errors
from lora_compose.pipelines.concepts.loading import read_lora
from lora_compose.pipelines.merging import MERGERS, make_merger
from lora_compose.pipelines.merging.calibration import calibrate, prompt_of
from recipe.concepts import STYLE

SIDE = 144
METHODS = tuple(name for name in MERGERS if name != "svd")  # which is the sum as well


@dataclass(frozen=True)
class Pair:
    """Two LoRAs and their prompts.

    Attributes:
        names: Of the playground's LoRAs.
        texts: A prompt for the first, for the second, and for both.
    """

    names: tuple[str, str]
    texts: tuple[str, str, str]


PAIRS = (
    Pair(
        ("cat", STYLE), ("a sks cat on grass", "a fox on grass in wfy style", "a sks cat on grass in wfy style")
    ),
    Pair(
        ("cat", "dog"), ("a sks cat on grass", "a zwx dog on grass", "a sks cat and a zwx dog on a white background")
    ),
)  # fmt: skip


def images(
    pair: Pair, methods: Sequence[str], steps: int, on_image: Callable[[], None] = lambda: None
) -> Iterator[tuple[str, list[Image.Image]]]:
    """An image of each text with each LoRA alone, which for the last text is none; then with each merged file."""
    pipe: Any = StableDiffusionPipeline.from_pretrained(playground_model(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)

    def image(path: Path | None, prompt: str) -> Image.Image:
        if path is not None:
            pipe.load_lora_weights(str(path))
        generator = torch.Generator().manual_seed(0)
        made = pipe(prompt, num_inference_steps=steps, guidance_scale=GUIDANCE, generator=generator)
        pipe.unload_lora_weights()
        on_image()
        return made.images[0]

    given = [Given(name, read_lora(playground_lora(name))) for name in pair.names]
    alone = [*(one.file.path for one in given), None]
    yield "each alone", [image(path, text) for path, text in zip(alone, pair.texts, strict=True)]
    with TemporaryDirectory() as folder:
        for method in methods:
            path = _merged(pipe, given, method, Path(folder))
            yield method, [image(path, text) for text in pair.texts]


def _merged(pipe: Any, given: Sequence[Given], method: str, folder: Path) -> Path:
    merger = make_merger(method)
    matched = match_files(given, pipe)
    moments = None
    if merger.needs_model:
        moments = calibrate(pipe, matched.changes, [prompt_of(one.file) for one in given], merger)
    path = folder / f"{method}.safetensors"
    merge_files(matched, merger, path, moments=moments, dtype=torch.float32)
    return path


def drawn(shown: Sequence[Sequence[tuple[str, list[Image.Image]]]]) -> Image.Image:
    """The sheet: a row for each method, three columns for each pair."""
    columns = [wrap(text, 11) for pair in PAIRS[: len(shown)] for text in pair.texts]
    rows = [
        Row((same[0][0],), [image for _, images in same for image in images], [""] * len(columns))
        for same in zip(*shown, strict=True)
    ]
    lines = ["Two LoRAs in one file. First row: each LoRA alone, and both texts without any."]
    return sheet(columns, rows, title="Merged files in plain diffusers", lines=lines, side=SIDE)


@handle_errors(logging.ERROR)
def main(
    out: Annotated[Path, typer.Argument(help="The sheet, a PNG.")],
    steps: Annotated[int, typer.Option(min=1)] = 16,
) -> None:
    """Merges a subject with a style and with a subject in every way."""
    diffusers.utils.logging.set_verbosity_error()  # it warns of every file that has nothing for the text encoder
    done = 0
    with bar("making images", len(PAIRS) * 3 * (1 + len(METHODS))) as on_progress, threads(THREADS):

        def on_image() -> None:
            nonlocal done
            done += 1
            on_progress(done)

        shown = [[*images(pair, METHODS, steps, on_image)] for pair in PAIRS]
    echo(save_image(drawn(shown), out))


if __name__ == "__main__":
    typer.run(main)
