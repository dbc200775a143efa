"""`lora-compose evaluate`: run a suite, write its report again, compare two evaluations."""

import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from typer.core import TyperGroup

from compose.terminal import FAILED, bar, err, kindly, out, say

_EXTRA = "the evaluation needs a few more packages: pip install 'lora-compose[evaluation]' (missing: {})"


class _Suites(TyperGroup):
    """`evaluate SUITE` is `evaluate run SUITE`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands:
            args = ["run", *args]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=_Suites,
    help="Scores methods on many scenes and seeds: lora-compose evaluate SUITE.",
    no_args_is_help=True,
)


@app.command("run")
@kindly(logging.ERROR)
def run(
    suite: Annotated[str, typer.Argument(help="A suite file, YAML or JSON, or the name of one that comes along.")],
    folder: Annotated[
        Path | None, typer.Option("--out", help="Where to; outputs/evaluation/NAME by default. A rerun continues.")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes; every GPU, or what the suite says, if not given.")
    ] = None,
) -> None:
    """Makes and scores all pictures of a suite and writes the report; continues where it was stopped."""
    _check_packages()
    from compose.evaluation.planning import make_plan
    from compose.evaluation.runner import evaluate, is_done
    from compose.evaluation.suite import read_suite

    asked = read_suite(suite)
    to = folder or Path("outputs/evaluation") / asked.name
    number = processes or _processes(asked.processes, asked.device)
    if number > 1 and "WORLD_SIZE" not in os.environ:
        _launch([suite, *(["--out", str(folder)] if folder else [])], number, asked.device)
        return
    main = int(os.environ.get("RANK", "0")) == 0
    total = len(make_plan(asked).batches) // int(os.environ.get("WORLD_SIZE", "1"))
    if main:
        say(f"{asked.name}: {len(make_plan(asked).batches)} batches of {asked.batch_size} pictures, in {to}", to=err)
        with bar("evaluating", total) as on_progress:
            evaluate(asked, to, on_progress)
        _say_report(to)
    else:
        evaluate(asked, to)
    if main and (left := sum(not is_done(to, planned) for planned in make_plan(asked).batches)):
        say(
            f"{left} batches failed; the report says why. Run the command again to try them again.", style="red", to=err
        )
        raise typer.Exit(FAILED)


@app.command()
@kindly(logging.ERROR)
def report(folder: Annotated[Path, typer.Argument(help="An evaluation's folder, finished or not.")]) -> None:
    """Writes the report of an evaluation again, from what is there."""
    _check_packages()
    _say_report(folder)


@app.command()
@kindly(logging.ERROR)
def compare(
    first: Annotated[Path, typer.Argument(help="An evaluation's folder.")],
    second: Annotated[Path, typer.Argument(help="Another one.")],
) -> None:
    """Says what is better in the second evaluation than in the first, and where the interval says nothing."""
    _check_packages()
    from compose.evaluation.comparison import compare_runs

    out.print(compare_runs(first, second))


def _say_report(folder: Path) -> None:
    from compose.evaluation.report import write_report

    written = write_report(folder)
    say(f"The report: {written.html}", style="bold")
    say(f"As a table: {written.markdown}; for pandas: {written.pictures}, {written.concepts}, {written.summary}")


def _check_packages() -> None:
    missing = []
    for name in ("scipy", "pandas", "matplotlib"):
        try:
            __import__(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise ValueError(_EXTRA.format(", ".join(missing)))


def _processes(wanted: int, device: str | None) -> int:
    """How many processes: one for each GPU, or what the suite wants where there are so many processors."""
    if torch.cuda.is_available() and device in (None, "cuda"):
        return torch.cuda.device_count()
    return 1 if device not in (None, "cpu") else min(wanted, os.cpu_count() or 1)


def _launch(arguments: Sequence[str], number: int, device: str | None) -> None:
    """The same command in several processes, by accelerate."""
    on_gpus = torch.cuda.is_available() and device != "cpu"
    kind = ["--multi_gpu"] if on_gpus else ["--cpu"]
    accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", str(number)]
    fixed = [
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--num_cpu_threads_per_process",
        "1",
    ]
    command = [*accelerate, *fixed, *kind, "--module", "compose", "evaluate", "run", *arguments]
    code = subprocess.run(command, check=False).returncode
    if code:
        raise typer.Exit(FAILED)
