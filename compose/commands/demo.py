"""`lora-compose demo`: the playground, offline."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from lora_compose.compose.commands.asked import seeds_of
from lora_compose.compose.files.paths import free_path
from lora_compose.compose.support.terminal import bar, echo, handle_errors, starting

_WHAT_TO_LOOK_AT = (
    "What to look at: are all concepts present, each as it is in the first two columns? merge sums the LoRA weights, "
    "so concepts blend or one is missing. draft, which is taken where no method is named, finds out in the first steps "
    "where the model puts each concept, and lets its LoRA act there. clora moves the concepts apart, finds each of "
    "them in the model's attention, and lets its LoRA act there. regional lets each LoRA act in its box only: clear if "
    "the model puts each object into its own box, which it does not always do. lora-composer also gives each box its "
    "own text, and so an object."
)


_SHEETS = ("The first pair, and the others follow", "All pairs", "Three concepts in boxes")


@handle_errors(logging.WARNING)
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the images and sheets; a numbered one if it exists.")] = Path(
        "outputs/demo"
    ),
    seed: Annotated[
        list[str] | None, typer.Option(help="Seed of the start noise, repeatable: 3, or 0-7. Default: 0 and 1.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps.", min=1)] = 25,
) -> None:
    """Compose four scenes of the playground, offline, on the CPU.

    A first sheet comes early, then the rest.
    """
    with starting():
        from lora_compose.compose.generate.demo import SEEDS, jobs, show
    todo = jobs(list(seeds_of(seed) if seed else SEEDS), steps)
    echo(f"{len(todo)} images: three pairs, each concept alone and composed in five ways, and three concepts in boxes")
    folder = free_path(out)
    with bar(f"composing {len(todo)} images", len(todo)) as on_progress:
        for title, sheet in zip(_SHEETS, show(folder, todo, on_progress), strict=True):
            echo(f"{title}: {sheet}", style="bold")
            if title == _SHEETS[0]:
                echo(_WHAT_TO_LOOK_AT)
    echo(f"The images, each with everything needed to reproduce it: {folder} (try: lora-compose replay IMAGE)")
