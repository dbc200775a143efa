"""`lora-compose replay`: reproduces an image from its metadata."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from lora_compose.compose.commands.asked import check_loras
from lora_compose.compose.commands.options import SaversOption
from lora_compose.compose.files.images import read_pixels, read_record
from lora_compose.compose.support.terminal import FAILED, handle_errors, starting


@handle_errors(logging.WARNING)
def replay(
    image: Annotated[Path, typer.Argument(help="A PNG made by lora-compose.")],
    out: Annotated[Path | None, typer.Option(help="Where to write the new image; default: not written.")] = None,
    loras: Annotated[Path | None, typer.Option(help="Folder in which moved LoRAs are found by content.")] = None,
    model: Annotated[str | None, typer.Option(help="The model's new location, if it has moved.")] = None,
    savers: SaversOption = None,
) -> None:
    """Reproduce an image from its metadata and compare every pixel. Exit code 1 if one differs."""
    record, given = read_record(image), read_pixels(image)
    check_loras(loras)
    with starting():
        from lora_compose.compose.generate.replay import replay_and_compare
    if not replay_and_compare(record, given, out=out, loras=loras, model=model, savers=savers or ()):
        raise typer.Exit(FAILED)
