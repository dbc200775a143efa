"""The command line: puts the commands together that the folders hold."""

import logging
from typing import Annotated

import typer

from lora_compose.compose.benchmark.bench import bench
from lora_compose.compose.check.command import check
from lora_compose.compose.evaluation.blind import blind
from lora_compose.compose.evaluation.command import app as evaluation
from lora_compose.compose.generate.demo_command import demo
from lora_compose.compose.generate.replay_command import replay
from lora_compose.compose.generate.run_command import run
from lora_compose.compose.lora.inspect_command import inspect_files
from lora_compose.compose.lora.merge_command import merge
from lora_compose.compose.page.launch import ui
from lora_compose.compose.support.terminal import kindly, say
from lora_compose.compose.support.version import __version__
from lora_compose.compose.training.command import train

app = typer.Typer(
    help="Several concept LoRAs in one diffusers image, each with its own identity.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(kindly()(bench))
app.command("inspect")(kindly(logging.ERROR)(inspect_files))
app.command()(kindly(logging.ERROR)(merge))
app.command()(train)
app.command()(ui)
app.command()(demo)
app.command()(run)
app.command()(check)
app.command()(replay)
app.add_typer(evaluation, name="evaluate")
app.add_typer(blind, name="blind")


def main() -> None:
    """The entry point."""
    app()


def _version(wanted: bool) -> None:
    if wanted:
        say(f"lora-compose {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Several concept LoRAs in one diffusers image, each with its own identity."""
