"""`lora-compose ui`: the page."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from lora_compose.compose.page.launch import start
from lora_compose.compose.playground.assets import PLAYGROUND
from lora_compose.compose.support.terminal import handle_errors


@handle_errors(logging.WARNING)
def ui(
    model: Annotated[
        str,
        typer.Argument(
            metavar="[MODEL]",
            help="playground, a folder as diffusers saves it, a .safetensors file, or a hub repository. Others can be "
            "opened on the page.",
        ),
    ] = PLAYGROUND,
    port: Annotated[int, typer.Option(help="Port of the page.", min=1, max=65535)] = 8501,
    host: Annotated[
        str,
        typer.Option(help="Address to listen on. There is no password: anybody who can reach the address can use it."),
    ] = "localhost",
    out: Annotated[Path, typer.Option(help="Folder for images.")] = Path("outputs"),
    loras: Annotated[Path | None, typer.Option(help="Folder whose LoRAs the page offers.")] = None,
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
) -> None:
    """Open the page in a browser: several LoRAs and a prompt."""
    start(model, port, host, out, loras, browser)
