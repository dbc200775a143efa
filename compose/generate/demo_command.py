"""`lora-compose demo`: the playground, offline."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from lora_compose.compose.generate.demo import SEEDS, Shown, jobs, show
from lora_compose.compose.generate.options import LAST_SEED, StepsOption
from lora_compose.compose.support.terminal import bar, kindly, say

_WHAT_TO_LOOK_AT = (
    "What to look at: are all concepts present, each with its own coat from the first two columns? merge "
    "sums the LoRA weights, so coats mix (cat and dog) or a concept is missing. tara lets each LoRA act on its "
    "own words only and separates nothing in space: on this small model one coat often takes both. clora moves the "
    "concepts apart, finds each of them in the model's attention, and lets its LoRA act there. regional lets "
    "each LoRA act in its box only: clear coats if the model puts each object into its own box, which it "
    "does not always do. lora-composer also gives each box its own text, and so an object."
)


@kindly(logging.WARNING)
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the images and sheets; a numbered one if it exists.")] = Path(
        "outputs/demo"
    ),
    seed: Annotated[list[int] | None, typer.Option(help="A seed, repeatable.", min=0, max=LAST_SEED)] = None,
    steps: StepsOption = 25,
) -> None:
    """Compose four scenes of the playground, offline, on the CPU, in two minutes."""
    todo = jobs(seed or SEEDS, steps)
    say(f"{len(todo)} images: three pairs, each concept alone and composed in five ways, and three concepts in boxes")
    with bar("composing", len(todo)) as on_progress:
        shown = show(out, todo, on_progress)
    _say_demo(shown)


def _say_demo(shown: Shown) -> None:
    say(f"The sheets: {shown.sheet} and {shown.three}", style="bold")
    say(f"The images, each with everything needed to reproduce it: {shown.folder} (try: lora-compose replay IMAGE)")
    say(_WHAT_TO_LOOK_AT)
