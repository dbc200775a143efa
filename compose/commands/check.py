"""`lora-compose check`: checks a run without generating an image."""

import logging
from pathlib import Path
from typing import Any

import typer

from lora_compose.compose.commands.asked import asked_run, seeds_of
from lora_compose.compose.commands.options import with_options_of
from lora_compose.compose.commands.run import run
from lora_compose.compose.support.spelling import as_options
from lora_compose.compose.support.terminal import BAD_INPUT, echo, handle_errors, starting


@handle_errors(logging.ERROR)
@with_options_of(run)
def check(**given: Any) -> None:
    """Show what a run matches, what it costs, and all its problems. Takes what `run` takes.

    Generates nothing.
    """
    asked = asked_run(given, looked_up=False)
    seeds, savers, out = seeds_of(given["seed"]), given["savers"], given["out"]
    with starting():
        from lora_compose.compose.check.report import check as check_run
    report = check_run(asked, loras=given["loras"], variant=given["variant"], savers=savers or (), out=out)
    facts = (*report.facts, ("saved memory", ", ".join(savers))) if savers else report.facts
    images = _images_words(len(seeds), out, maps=given["maps"])
    facts = (*facts, ("seeds", ", ".join(map(str, seeds))), ("images", images))
    wide = max(len(label) for label, _ in facts)
    for label, text in facts:
        echo(f"{label:{wide}}  {as_options(text) if label == 'method' else text}")
    for note in report.notes:
        echo(f"note: {as_options(note)}", style="yellow")
    for problem in report.problems:
        echo(f"problem: {as_options(problem)}", style="red")
    if report.problems:
        raise typer.Exit(BAD_INPUT)
    echo("no problems", style="green")


def _images_words(number: int, out: Path, *, maps: bool) -> str:
    """The files of a run: how many images, in which folder, and whether with sheets of attention maps."""
    images = f"{number} in {out}" if number == 1 else f"{number} and a contact sheet in {out}"
    return f"{images}, and for each a sheet of maps" if maps else images
