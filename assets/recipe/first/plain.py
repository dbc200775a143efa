"""Plain prompts on a model of the playground, without LoRAs: a sheet, and a count of objects that the judge names.

python -m recipe.first.plain sheet.png assets/playground-flux/model
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from PIL import Image

from lora_compose.compose.evaluation.detectors import Detector, WindowDetector
from lora_compose.compose.evaluation.encoders import load_encoder
from lora_compose.compose.figures.sheets import Row, sheet
from lora_compose.compose.files.images import save_image
from lora_compose.compose.playground.assets import PLAYGROUND_FLUX
from lora_compose.compose.support.terminal import bar, echo, handle_errors
from lora_compose.pipelines.families import ComposePipeline
from recipe.first.world import BASE_CLASSES

PROMPTS = {  # and the classes that they name
    "a cat on grass": ("cat",),
    "a rabbit in snow": ("rabbit",),
    "a penguin on a pink background": ("penguin",),
    "a dog and a car on a white background": ("dog", "car"),
    "a bear and a robot on a blue background": ("bear", "robot"),
    "a red bird and a tree in the sky": ("bird", "tree"),
    "a horse and a house on sand": ("horse", "house"),
    "a blue fish and a turtle underwater": ("fish", "turtle"),
    "a lion and a fox in a forest": ("lion", "fox"),
    "a pig and a mushroom on a wooden floor": ("pig", "mushroom"),
}
STEPS, GUIDANCE = 25, 4.0
SHOWN = 6  # images of a prompt on the sheet


class Named(NamedTuple):
    """What the judge found in an image.

    Attributes:
        all: Whether every object of the prompt is found.
        exactly: Whether also none is found twice.
    """

    all: bool
    exactly: bool


def make(pipe: Any, prompt: str, seeds: Iterable[int]) -> list[Image.Image]:
    """One image for every seed, in one batch."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    width, height = pipe.own_size
    made = pipe(
        prompt=[prompt] * len(generators), num_inference_steps=STEPS, width=width, height=height, generator=generators,
        **pipe.guided(GUIDANCE, None),
    )  # fmt: skip
    return made.images


def name(detector: Detector, image: Image.Image, classes: Sequence[str]) -> Named:
    """Looks for what a prompt names."""
    found = [one.word for one in detector.detect(image, classes)]
    return Named(set(found) == set(classes), sorted(found) == sorted(classes))


@handle_errors()
def main(
    out: Annotated[Path, typer.Argument(help="The sheet, a PNG.")],
    models: Annotated[list[Path], typer.Argument(help="Folders as diffusers saves them.")],
    seeds: Annotated[int, typer.Option(min=1, help="How many, from 0.")] = 10,
) -> None:
    """Makes images of ten prompts with every model, and counts those in which the judge names all objects."""
    detector = WindowDetector(load_encoder(f"{PLAYGROUND_FLUX}:judge"), BASE_CLASSES)
    pipes = [ComposePipeline.from_pretrained(model, dtype=torch.float32) for model in models]
    rows: list[Row] = []
    totals: list[list[Named]] = [[] for _ in models]
    with bar("making images", len(PROMPTS) * len(pipes)) as on_progress:
        for i, (prompt, classes) in enumerate(PROMPTS.items()):
            for j, pipe in enumerate(pipes):
                pipe.set_progress_bar_config(disable=True)
                made = make(pipe, prompt, range(seeds))
                named = [name(detector, image, classes) for image in made]
                totals[j] += named
                label = (prompt, f"{models[j]}: all named in {sum(one.all for one in named)} of {seeds}")
                rows.append(Row(label if j == 0 else ("", label[1]), made[:SHOWN], parted=j == 0))
                on_progress(i * len(pipes) + j + 1)
    for model, named in zip(models, totals, strict=True):
        echo(
            f"{model}: all objects named in {sum(one.all for one in named)} of {len(named)} images, "
            f"none of them twice in {sum(one.exactly for one in named)}"
        )
    columns = [(f"seed {seed}",) for seed in range(min(seeds, SHOWN))]
    echo(save_image(sheet(columns, rows, title="Plain prompts, no LoRA", side=128), out))


if __name__ == "__main__":
    typer.run(main)
