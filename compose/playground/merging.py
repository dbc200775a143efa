"""Pairs of the playground's LoRAs merged in every way: a sheet, and how far each LoRA alone is from what it was.

python -m lora_compose.compose.playground.merging docs/images/merging.png
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import diffusers.utils.logging
import numpy as np
import torch
import typer
from diffusers import StableDiffusionPipeline
from PIL import Image

from lora_compose.compose.assets import playground_lora, playground_model
from lora_compose.compose.demo import GUIDANCE, THREADS
from lora_compose.compose.files import save_image
from lora_compose.compose.lora.calibration import calibrate, prompt_of
from lora_compose.compose.lora.merging import Given, match_files, merge_files
from lora_compose.compose.models import threads
from lora_compose.compose.sheets import Row, sheet
from lora_compose.compose.terminal import bar, kindly, say
from lora_compose.pipelines.loading import read_lora
from lora_compose.pipelines.merging import MERGERS, make_merger

SIDE = 192
METHODS = (*MERGERS, "ties, density 0.5")


@dataclass(frozen=True)
class Pair:
    """Two LoRAs, and what they are asked for.

    Attributes:
        names: Of the playground's LoRAs.
        alone: What shows each of them.
        both: What shows both.
    """

    names: tuple[str, str]
    alone: tuple[str, str]
    both: str


PAIRS = (
    Pair(("cat", "faded"), ("a sks cat on grass", "a fox on grass in wfy style"), "a sks cat on grass in wfy style"),
    Pair(("cat", "dog"), ("a sks cat on grass", "a zwx dog on grass"), "a sks cat and a zwx dog on a white background"),
)


@dataclass(frozen=True)
class Shown:
    """What a merged file gives.

    Attributes:
        method: How it was merged.
        images: For the two texts that show one, and the one that shows both; the first seed.
        far: For each LoRA, how far images are from those of that LoRA alone: 0 is the same, 1 as far as without a LoRA.
            Root mean squares over all pixels and seeds.
    """

    method: str
    images: tuple[Image.Image, ...]
    far: tuple[float, float]


def compared(
    pair: Pair, methods: Sequence[str], seeds: int, steps: int, on_image: Callable[[], None] = lambda: None
) -> Iterator[Shown]:
    """Merges a pair in several ways and makes images with plain diffusers."""
    pipe: Any = StableDiffusionPipeline.from_pretrained(playground_model(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)

    def images(path: Path | None, prompt: str) -> np.ndarray:
        if path is not None:
            pipe.load_lora_weights(str(path))
        generators = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
        made = pipe(
            [prompt] * seeds, num_inference_steps=steps, guidance_scale=GUIDANCE, generator=generators, output_type="np"
        )
        pipe.unload_lora_weights()
        on_image()
        return made.images

    given = [Given(name, read_lora(playground_lora(name))) for name in pair.names]
    own = [images(one.file.path, prompt) for one, prompt in zip(given, pair.alone, strict=True)]
    plain = [images(None, prompt) for prompt in pair.alone]
    yield Shown("each alone", (*map(_first, own), _first(images(None, pair.both))), (0.0, 0.0))
    with TemporaryDirectory() as folder:
        for method in methods:
            path = _merged(pipe, given, method, Path(folder))
            made = [images(path, prompt) for prompt in (*pair.alone, pair.both)]
            far = tuple(_size(made[i] - own[i]) / _size(plain[i] - own[i]) for i in range(2))
            yield Shown(method, tuple(map(_first, made)), (far[0], far[1]))


def _merged(pipe: Any, given: Sequence[Given], method: str, folder: Path) -> Path:
    name, _, setting = method.partition(", density ")
    merger = make_merger(name, {"density": float(setting)} if setting else None)
    matched = match_files(given, pipe)
    moments = calibrate(pipe, matched, [*map(prompt_of, given)]) if merger.needs_model else None
    path = folder / f"{method}.safetensors"
    merge_files(matched, merger, path, moments=moments, dtype=torch.float32)
    return path


def _size(difference: np.ndarray) -> float:
    return float(np.sqrt((difference**2).mean()))


def _first(images: np.ndarray) -> Image.Image:
    return Image.fromarray((images[0] * 255).round().astype("u1"))


def drawn(shown: Sequence[Sequence[Shown]]) -> Image.Image:
    """The sheet: a row for each method, three columns for each pair."""
    columns = [(text,) for pair in PAIRS[: len(shown)] for text in (*pair.alone, pair.both)]
    rows = [
        Row((same[0].method,), [image for one in same for image in one.images], _captions(same))
        for same in zip(*shown, strict=True)
    ]
    lines = [
        "Two LoRAs in one file. First row: each LoRA alone, and both texts without any.",
        "Above an image: how far it is from that of the LoRA alone; 0 is the same, 1 as far as without a LoRA.",
    ]
    return sheet(columns, rows, title="Merged files in plain diffusers", lines=lines, side=SIDE)


def _captions(same: Sequence[Shown]) -> list[str]:
    return [text for one in same for text in (*(f"{far:.2f}" for far in one.far), "")]


@kindly(logging.ERROR)
def main(
    out: Annotated[Path, typer.Argument(help="The sheet, a PNG.")],
    seeds: Annotated[int, typer.Option(min=1, help="Images of each text.")] = 4,
    steps: Annotated[int, typer.Option(min=1)] = 12,
) -> None:
    """Merges a subject with a style and with a subject in every way, and shows what is left of each."""
    diffusers.utils.logging.set_verbosity_error()  # it warns of every file that has nothing for the text encoder
    shown, done = [], 0
    with bar("making images", len(PAIRS) * (5 + 3 * len(METHODS))) as on_progress, threads(THREADS):

        def on_image() -> None:
            nonlocal done
            done += 1
            on_progress(done)

        for pair in PAIRS:
            shown.append([])
            for one in compared(pair, METHODS, seeds, steps, on_image):
                shown[-1].append(one)
                first, second = (f"{name} {far:.2f}" for name, far in zip(pair.names, one.far, strict=True))
                say(f"{' + '.join(pair.names)}, {one.method}: {first}, {second}")
    say(save_image(drawn(shown), out))


if __name__ == "__main__":
    typer.run(main)
