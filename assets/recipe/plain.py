"""Plain prompts without LoRAs: a sheet, and a count of objects that the judge names, and of copies.

PYTHONPATH=assets python -m recipe.plain sheet.png MODEL FLUX --judge JUDGE
PYTHONPATH=assets python -m recipe.plain sheet.png MODEL FLUX --three
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from PIL import Image

from lora_compose.compose.evaluation.detectors import Detector, WindowDetector
from lora_compose.compose.evaluation.encoders import JUDGE, load_encoder
from lora_compose.compose.figures.sheets import Row, sheet
from lora_compose.compose.files.images import save_image
from lora_compose.compose.support.terminal import bar, echo, handle_errors
from lora_compose.pipelines.families import ComposePipeline
from recipe.suites import HELD_BACK_SQUARES, Place, threes
from recipe.world import CHARACTERS, CLASSES

PROMPTS: dict[str, tuple[str, ...]] = {  # and the classes that they name
    "a cat on grass": ("cat",),
    "a penguin in snow": ("penguin",),
    "a woman dressed as a farmer in a room": ("woman",),
    "a dog and a red car on a white background": ("dog", "car"),
    "a bear and a robot on a blue background": ("bear", "robot"),
    "a woman with red hair and a man on sand": ("woman", "man"),
    "a black rabbit and a fox at sunset": ("rabbit", "fox"),
    "a girl and a boy underwater": ("girl", "boy"),
    "a dog and a penguin in a forest": ("dog", "penguin"),
    "an owl and a tree at night": ("owl", "tree"),
}
THREE = {
    Place(tuple(f"+{word}" for word in words), place.ground).prompt: words
    for place in threes(HELD_BACK_SQUARES)
    if (words := tuple(CHARACTERS[name].class_word for name in place.names))
}
"""The scenes of the suite playground-threes, without triggers."""
STEPS, GUIDANCE = 25, 5.0
SHOWN = 6  # images of a prompt on the sheet


class Named(NamedTuple):
    """What the judge saw in an image.

    Attributes:
        all: Whether every object of the prompt is there.
        exactly: Whether also none is there twice.
        copied: Whether one is missing, and another is there twice in its stead.
    """

    all: bool
    exactly: bool
    copied: bool


def make(pipe: Any, prompt: str, seeds: Iterable[int], **arguments: Any) -> list[Image.Image]:
    """One image for every seed, in one batch, with further arguments of the pipeline."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    width, height = pipe.own_size
    return pipe(
        prompt=[prompt] * len(generators), num_inference_steps=STEPS, width=width, height=height, generator=generators,
        **pipe.guided(GUIDANCE, None), **arguments,
    ).images  # fmt: skip


def named(detector: Detector, image: Image.Image, classes: Sequence[str]) -> Named:
    """Looks for what a prompt names."""
    words = [each.word for each in detector.detect(image, classes)]
    every = set(words) == set(classes)
    return Named(every, sorted(words) == sorted(classes), not every and len(words) > len(set(words)))


@handle_errors()
def main(
    out: Annotated[Path, typer.Argument(help="The sheet, a PNG.")],
    models: Annotated[list[Path], typer.Argument(help="Folders as diffusers saves them.")],
    judge: Annotated[str, typer.Option(help="The playground's, or a folder.")] = JUDGE,
    seeds: Annotated[int, typer.Option(min=1, help="How many, from 0.")] = 10,
    three: Annotated[bool, typer.Option("--three", help="Prompts of three objects, instead of one or two.")] = False,
) -> None:
    """Makes images of plain prompts with every model, and counts those in which the judge names all objects."""
    prompts = THREE if three else PROMPTS
    detector = WindowDetector(load_encoder(judge), CLASSES)
    pipes: list[Any] = [ComposePipeline.from_pretrained(model, dtype=torch.float32) for model in models]
    rows: list[Row] = []
    totals: list[list[Named]] = [[] for _ in models]
    with bar("making images", len(prompts) * len(pipes)) as on_progress:
        for i, (prompt, classes) in enumerate(prompts.items()):
            for j, pipe in enumerate(pipes):
                pipe.set_progress_bar_config(disable=True)
                images = make(pipe, prompt, range(seeds))
                right = [named(detector, image, classes) for image in images]
                totals[j] += right
                label = (prompt, f"{models[j].name}: all named in {sum(each.all for each in right)} of {seeds}")
                rows.append(Row(label if j == 0 else ("", label[1]), images[:SHOWN], parted=j == 0))
                on_progress(i * len(pipes) + j + 1)
    for model, right in zip(models, totals, strict=True):
        echo(
            f"{model}: all objects named in {sum(each.all for each in right)} of {len(right)} images, "
            f"none of them twice in {sum(each.exactly for each in right)}; one twice instead of another in "
            f"{sum(each.copied for each in right)}"
        )
    columns = [(f"seed {seed}",) for seed in range(min(seeds, SHOWN))]
    echo(save_image(sheet(columns, rows, title="Plain prompts, no LoRA", side=192), out))


if __name__ == "__main__":
    typer.run(main)
