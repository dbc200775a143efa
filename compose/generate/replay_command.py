"""`lora-compose replay`: makes an image again from what it carries."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from lora_compose.compose.files.images import read_pixels, read_record, save_image
from lora_compose.compose.generate.machine import threads
from lora_compose.compose.generate.models import open_model
from lora_compose.compose.generate.options import SaversOption
from lora_compose.compose.generate.replay import changes, difference, remake, runnable
from lora_compose.compose.support.terminal import FAILED, bar, kindly, say


@kindly(logging.WARNING)
def replay(
    image: Annotated[Path, typer.Argument(help="A PNG made by lora-compose.")],
    out: Annotated[Path | None, typer.Option(help="Where to write the new image; default: nowhere.")] = None,
    loras: Annotated[Path | None, typer.Option(help="Folder in which moved LoRAs are found by content.")] = None,
    model: Annotated[str | None, typer.Option(help="The model's new location, if it has moved.")] = None,
    savers: SaversOption = None,
) -> None:
    """Reproduce an image from its metadata and compare every pixel. Exit code 1 if one differs."""
    record, given = read_record(image), read_pixels(image)
    if loras is not None and not loras.is_dir():
        raise ValueError(f"there is no folder {str(loras)!r}; --loras names a folder with safetensors files")
    asked = runnable(record, loras)
    asked = asked if model is None else asked.model_copy(update={"model": model})
    say(f"{asked.model}, {asked.method or 'no method'}, seed {asked.seed}, {asked.steps} steps: {asked.scene.prompt}")
    pipe = open_model(asked, savers or ())
    with threads(record.machine.threads), bar("composing", 1) as on_progress:
        made = remake(pipe, record, asked, on_progress)
    if out is not None:
        say(save_image(made.image, out, made.record))
    for change in changes(record, made.record):
        say(f"changed: {change}", style="yellow")
    found = difference(given, made.image)
    say(f"different: {found}" if found else "identical: every pixel is the same", style="red" if found else "green")
    if found:
        raise typer.Exit(FAILED)
