"""The command line: puts the commands together."""

from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from lora_compose.compose.commands import blind, comfyui, evaluate
from lora_compose.compose.commands.batch import batch
from lora_compose.compose.commands.bench import bench
from lora_compose.compose.commands.check import check
from lora_compose.compose.commands.demo import demo
from lora_compose.compose.commands.inspect import inspect
from lora_compose.compose.commands.merge import merge
from lora_compose.compose.commands.methods import methods
from lora_compose.compose.commands.refine import refine
from lora_compose.compose.commands.replay import replay
from lora_compose.compose.commands.run import run
from lora_compose.compose.commands.serve import serve
from lora_compose.compose.commands.train import train
from lora_compose.compose.commands.ui import ui
from lora_compose.compose.support.terminal import echo
from lora_compose.compose.support.version import __version__
from lora_compose.pipelines.support.spelling import meant_by


class _Command(TyperCommand):
    """Other programs' names of options lead to those that are meant: `--size` to `--width` and `--height`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except Exception as error:  # of click's or typer's own copy of it
            options = {name.strip("-").replace("-", "_"): name for param in self.params for name in param.opts}
            unknown = getattr(error, "option_name", "").strip("-").replace("-", "_")
            if meant := meant_by(unknown, options):
                error.__dict__["possibilities"] = [options[name] for name in meant]
            raise


app = typer.Typer(
    help="Several concept LoRAs in one diffusers image, each with its own identity.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # whose tables leave 18 letters of a line for the help of an option, and cut examples
)
for command in (run, batch, demo, ui, serve, check, methods, replay, refine, inspect, merge, train, bench):
    app.command(cls=_Command)(command)
app.add_typer(evaluate.app, name="evaluate")
app.add_typer(blind.app, name="blind")
app.add_typer(comfyui.app, name="comfyui")


def main() -> None:
    """The entry point."""
    app()


def _version(wanted: bool) -> None:
    if wanted:
        echo(f"lora-compose {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Several concept LoRAs in one diffusers image, each with its own identity."""
