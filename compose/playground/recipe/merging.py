"""Pairs of the playground's LoRAs merged in every way: a sheet, and how much of each is left when it is called alone.

python -m lora_compose.compose.playground.recipe.merging docs/images/merging.png
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import wrap
from typing import Annotated, Any

import diffusers.utils.logging
import numpy as np
import torch
import typer
from diffusers import StableDiffusionPipeline
from PIL import Image

from lora_compose.compose.evaluation.detectors import WindowDetector
from lora_compose.compose.evaluation.encoders import load_encoder
from lora_compose.compose.evaluation.scoring import reference_crop, squared
from lora_compose.compose.figures.sheets import Row, sheet
from lora_compose.compose.files.images import save_image
from lora_compose.compose.generate.demo import GUIDANCE, THREADS
from lora_compose.compose.generate.machine import threads
from lora_compose.compose.lora.merging import Given, match_files, merge_files
from lora_compose.compose.playground.assets import PLAYGROUND, playground_lora, playground_model, playground_references
from lora_compose.compose.playground.words import BASE_CLASSES
from lora_compose.compose.support.terminal import bar, kindly, say
from lora_compose.pipelines.concepts.loading import LoraFile, read_lora
from lora_compose.pipelines.merging import MERGERS, make_merger
from lora_compose.pipelines.merging.calibration import calibrate, prompt_of

SIDE = 128
METHODS = (*(name for name in MERGERS if name != "svd"), "ties, density 0.5")  # svd is the sum as well


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
        left: For each LoRA, how much of it is seen: 1 as with that LoRA alone, 0 as without a LoRA.
    """

    method: str
    images: tuple[Image.Image, ...]
    left: tuple[float, float]


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
    seen = [_measure(one.file) for one in given]
    own = [images(one.file.path, prompt) for one, prompt in zip(given, pair.alone, strict=True)]
    ends = [
        (see(images(None, prompt)), see(with_it)) for see, prompt, with_it in zip(seen, pair.alone, own, strict=True)
    ]
    yield Shown("each alone", (*map(_first, own), _first(images(None, pair.both))), (1.0, 1.0))
    with TemporaryDirectory() as folder:
        for method in methods:
            path = _merged(pipe, given, method, Path(folder))
            made = [images(path, prompt) for prompt in (*pair.alone, pair.both)]
            left = [_share(see(one), *end) for see, one, end in zip(seen, made, ends, strict=False)]
            yield Shown(method, tuple(map(_first, made)), (left[0], left[1]))


def _measure(file: LoraFile) -> Callable[[np.ndarray], np.ndarray]:
    """What to look at to see a LoRA: a subject's likeness to its references, or the colours of a style."""
    if file.class_word == "style":
        return lambda images: np.concatenate([images.mean((0, 1, 2)), images.std((0, 1, 2))])
    encoder = load_encoder(f"{PLAYGROUND}:judge")
    detector = WindowDetector(encoder, BASE_CLASSES)
    references = encoder.images([reference_crop(path) for path in playground_references(file.path.stem)])

    def likeness(images: np.ndarray) -> np.ndarray:
        found = []
        for image in map(_picture, images):
            boxes = [one.box for one in detector.detect(image, [file.class_word or ""])] or [(0, 0, *image.size)]
            crops = encoder.images([squared(image.crop(box)) for box in boxes])
            found.append(float((crops @ references.T).mean(1).max()))
        return np.array([np.mean(found)])

    return likeness


def _share(found: np.ndarray, without: np.ndarray, alone: np.ndarray) -> float:
    """How far it is on the way from without a LoRA to that LoRA alone."""
    way = alone - without
    return float((found - without) @ way / (way @ way))


def _merged(pipe: Any, given: Sequence[Given], method: str, folder: Path) -> Path:
    name, _, setting = method.partition(", density ")
    merger = make_merger(name, {"density": float(setting)} if setting else None)
    matched = match_files(given, pipe)
    moments = calibrate(pipe, matched.changes, [prompt_of(one.file) for one in given]) if merger.needs_model else None
    path = folder / f"{method}.safetensors"
    merge_files(matched, merger, path, moments=moments, dtype=torch.float32)
    return path


def _picture(image: np.ndarray) -> Image.Image:
    return Image.fromarray((image * 255).round().astype("u1"))


def _first(images: np.ndarray) -> Image.Image:
    return _picture(images[0])


def drawn(shown: Sequence[Sequence[Shown]]) -> Image.Image:
    """The sheet: a row for each method, three columns for each pair."""
    columns = [wrap(text, 12) for pair in PAIRS[: len(shown)] for text in (*pair.alone, pair.both)]
    rows = [
        Row((same[0].method,), [image for one in same for image in one.images], _captions(same))
        for same in zip(*shown, strict=True)
    ]
    lines = [
        "Two LoRAs in one file. First row: each LoRA alone, and both texts without any.",
        "Above an image: how much of the LoRA is seen, over all seeds; 1 as with it alone, 0 as without any.",
    ]
    return sheet(columns, rows, title="Merged files in plain diffusers", lines=lines, side=SIDE)


def _captions(same: Sequence[Shown]) -> list[str]:
    return [text for one in same for text in (*(f"{left:.2f}" for left in one.left), "")]


@kindly(logging.ERROR)
def main(
    out: Annotated[Path, typer.Argument(help="The sheet, a PNG.")],
    seeds: Annotated[int, typer.Option(min=1, help="Images of each text.")] = 3,
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
                first, second = (f"{name} {left:.2f}" for name, left in zip(pair.names, one.left, strict=True))
                say(f"{' + '.join(pair.names)}, {one.method}: {first}, {second}")
    say(save_image(drawn(shown), out))


if __name__ == "__main__":
    typer.run(main)
