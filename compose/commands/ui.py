"""`lora-compose ui`: the page."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from lora_compose.compose.page.launch import start
from lora_compose.compose.support.terminal import handle_errors


@handle_errors(logging.WARNING)
def ui(
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
    start(port, host, out, loras, browser)
