"""`lora-compose comfyui`: the nodes for ComfyUI."""

from pathlib import Path
from typing import Annotated

import typer

from lora_compose.compose.comfyui import installing
from lora_compose.compose.support.terminal import echo, handle_errors

app = typer.Typer(help="Nodes for ComfyUI: several LoRAs in one pass, each in its place.", no_args_is_help=True)
ComfyUI = Annotated[Path, typer.Argument(metavar="PATH_TO_COMFYUI", help="The folder of ComfyUI, with main.py in it.")]


@app.command()
@handle_errors()
def install(comfyui: ComfyUI) -> None:
    """Add the nodes to ComfyUI.

    Writes a small folder into custom_nodes that imports lora-compose, and nothing else.
    """
    echo(f"{installing.install(comfyui)} is written. Start ComfyUI again; the nodes are under lora-compose.")


@app.command()
@handle_errors()
def uninstall(comfyui: ComfyUI) -> None:
    """Remove that folder."""
    echo(f"{installing.uninstall(comfyui)} is removed. Start ComfyUI again.")
