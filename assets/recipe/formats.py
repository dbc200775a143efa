"""One scene of the playground with the cat's LoRA in the format of every trainer: a sheet, and pixel differences.

python -m recipe.formats docs/images/formats.png
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from PIL import Image

from lora_compose.attention import LoraFactors
from lora_compose.compose.figures.sheets import Row, sheet
from lora_compose.compose.files.images import save_image
from lora_compose.compose.generate.demo import BOXES, GUIDANCE, STEPS, THREADS
from lora_compose.compose.generate.machine import threads
from lora_compose.compose.playground.assets import playground_lora, playground_model
from lora_compose.compose.support.terminal import bar, echo, handle_errors
from lora_compose.pipelines.concepts.loading import match, read_lora
from lora_compose.pipelines.families import ComposePipeline
from lora_compose.pipelines.scene.scene import Concept
from recipe.lora_files import DIFFUSERS, FORMATS, Format, Loras

PROMPT = "a sks cat and a zwx dog on a white background"
METHOD, SEED = "lora-composer", 0
LEAST = "attention processors"
FORMS = (*(form for form in FORMATS if form != LEAST), LEAST)
"""The one that holds the least comes last."""
ACROSS, SIDE = 5, 224


class Shown(NamedTuple):
    """An image with the LoRA in one format.

    Attributes:
        name: The format.
        image: The image.
        difference: Largest difference of a pixel from the image of the same layers as shipped, of 255; None for that
            image itself.
    """

    name: str
    image: Image.Image
    difference: int | None = None


def pictures(forms: Sequence[str], steps: int = STEPS) -> Iterator[Shown]:
    """The scene with the LoRA as shipped, and from files of these formats."""
    pipe = ComposePipeline.from_pretrained(playground_model(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_concept(playground_lora("dog"), "dog")
    whole = _shipped(pipe)
    expected: dict[int, Image.Image] = {}  # by number of layers
    for form in forms:
        known = FORMATS[form]
        held = known.held(whole)
        layers = sum(map(len, held.values()))
        if layers not in expected:
            expected[layers] = _picture(pipe, DIFFUSERS, held, steps)
            yield Shown("as it is shipped" if held == whole else "attention layers alone", expected[layers])
        image = _picture(pipe, known, held, steps)
        yield Shown(form, image, _difference(image, expected[layers]))


def _shipped(pipe: Any) -> Loras:
    """The cat's factors as the playground has them, in single precision."""
    found = match(read_lora(playground_lora("cat")), pipe)
    return {
        part: {name: LoraFactors(it.down.float(), it.up.float(), it.scale) for name, it in lora.items()}
        for part, lora in found.by_part.items()
    }


def _picture(pipe: Any, form: Format, loras: Loras, steps: int) -> Image.Image:
    with TemporaryDirectory() as folder:
        path = form.write(loras, pipe, Path(folder))
        pipe.load_concept(path, "cat", trigger="sks", class_word="cat", **form.options)
    boxed = [Concept(name=name, region=box) for name, box in zip(("cat", "dog"), BOXES, strict=True)]
    generator = torch.Generator().manual_seed(SEED)
    made = pipe(
        PROMPT, concepts=boxed, method=METHOD, num_inference_steps=steps, guidance_scale=GUIDANCE, generator=generator
    )
    pipe.unload_concept("cat")
    return made.images[0]


def _difference(one: Image.Image, other: Image.Image) -> int:
    first, second = (np.asarray(image, dtype=int) for image in (one, other))
    return int(abs(first - second).max())


def drawn(shown: Sequence[Shown]) -> Image.Image:
    """The sheet."""
    parts = [shown[start : start + ACROSS] for start in range(0, len(shown), ACROSS)]
    rows = [Row((), [one.image for one in part], [one.name for one in part]) for part in parts]
    lines = [
        f"The cat's LoRA in the files of every trainer; the dog's in diffusers' all the time. {METHOD}, seed {SEED}.",
        f"Largest difference of any pixel from what the same layers give as shipped: {_largest(shown)} of 255.",
    ]
    return sheet([()] * ACROSS, rows, title=PROMPT, lines=lines, side=SIDE)


def _largest(shown: Sequence[Shown]) -> int:
    return max(one.difference for one in shown if one.difference is not None)


@handle_errors(logging.ERROR)
def main(
    out: Annotated[Path, typer.Argument(help="The sheet, a PNG.")],
    steps: Annotated[int, typer.Option(min=1)] = STEPS,
) -> None:
    """Makes the same image with one LoRA in every format, and prints how much the images differ."""
    shown: list[Shown] = []
    with bar("making images", len(FORMS) + 2) as on_progress, threads(THREADS):
        for one in pictures(FORMS, steps):
            shown.append(one)
            on_progress(len(shown))
    for one in shown:
        if one.difference is not None:
            echo(f"{one.name}: largest difference of any pixel {one.difference} of 255")
    echo(f"all formats: {_largest(shown)} of 255")
    echo(save_image(drawn(shown), out))


if __name__ == "__main__":
    typer.run(main)
