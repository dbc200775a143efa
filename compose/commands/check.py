"""`lora-compose check`: checks a scene without generating an image."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from lora_compose.compose.commands import options
from lora_compose.compose.files.scenes import read_scene
from lora_compose.compose.playground.assets import PLAYGROUND
from lora_compose.compose.support.terminal import BAD_INPUT, echo, handle_errors, starting


@handle_errors(logging.ERROR)
def check(
    scene: Annotated[Path, typer.Argument(help="A scene file, YAML or JSON.")],
    model: options.ModelOption = PLAYGROUND,
    method: options.MethodOption = None,
    settings: options.SetOption = None,
    steps: options.StepsOption = 25,
    guidance: options.GuidanceOption = 5.0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 or mps; default: the fastest.")] = None,
) -> None:
    """Show what a scene matches, what it costs, and all its problems.

    Generates nothing.
    """
    asked = options.run_of(
        scene=read_scene(scene), model=model, method=method, settings=options.parse_settings(settings or []),
        steps=steps, guidance_scale=guidance, device=device,
    )  # fmt: skip
    with starting():
        from lora_compose.compose.check.report import check as check_run
    report = check_run(asked)
    wide = max(len(label) for label, _ in report.facts)
    for label, text in report.facts:
        echo(f"{label:{wide}}  {text}")
    for note in report.notes:
        echo(f"note: {note}", style="yellow")
    for problem in report.problems:
        echo(f"problem: {problem}", style="red")
    if report.problems:
        raise typer.Exit(BAD_INPUT)
    echo("no problems", style="green")
