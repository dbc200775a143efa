"""`lora-compose evaluate`: run a suite, write its report again, compare two evaluations."""

import logging
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lora_compose.compose.commands.asked import check_ray
from lora_compose.compose.commands.options import RayOption
from lora_compose.compose.evaluation.shipped import find_suite, published_dir
from lora_compose.compose.support.packages import EVALUATION, check_packages
from lora_compose.compose.support.terminal import handle_errors, starting


class _Suites(TyperGroup):
    """`evaluate SUITE` is `evaluate run SUITE`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands:
            args = ["run", *args]
        return super().resolve_command(ctx, args)


MetricsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--metrics",
        help="Further metrics, instead of the suite's: clip-t, clip-i, dino, scr, parted by commas; NAME=MODEL for "
        "another model, a folder or hub repository; arcface=FILE.onnx+FACES.onnx for networks of faces.",
    ),
]

ProcessesOption = Annotated[
    int | None, typer.Option(min=1, help="Number of processes; default: one per GPU, or as in the suite.")
]

app = typer.Typer(cls=_Suites, help="Score methods on many scenes: lora-compose evaluate SUITE.", no_args_is_help=True)


@app.command("run")
@handle_errors(logging.ERROR)
def run(
    suite: Annotated[str, typer.Argument(help="A suite file, YAML or JSON, or the name of a shipped suite.")],
    folder: Annotated[
        Path | None, typer.Option("--out", help="Output folder; default: outputs/evaluation/NAME. A rerun resumes.")
    ] = None,
    processes: ProcessesOption = None,
    ray: RayOption = None,
    metrics: MetricsOption = None,
) -> None:
    """Generate and score all images of a suite and write the report.

    A rerun resumes; further processes join in.
    """
    find_suite(suite)
    check_packages("the evaluation", EVALUATION, "evaluation")
    check_ray(ray)
    with starting():
        from lora_compose.compose.evaluation.command import run_suite
    if code := run_suite(suite, folder, processes, ray, _names(metrics)):
        raise typer.Exit(code)


@app.command()
@handle_errors(logging.ERROR)
def published(
    suite: Annotated[
        str, typer.Argument(help="A file with downloads and a suite, or a shipped one, such as characters-sdxl.")
    ],
    folder: Annotated[
        Path | None, typer.Option("--out", help="Output folder; default: outputs/evaluation/NAME. A rerun resumes.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Show downloads, licences and images, and stop.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="Download, make two images, show the cost, and stop.")] = False,
    processes: ProcessesOption = None,
    ray: RayOption = None,
) -> None:
    """Evaluate public models and LoRAs.

    They are downloaded, and the cost is shown before it starts.
    """
    path = find_suite(suite, published_dir())
    if plan:
        with starting():
            from lora_compose.compose.evaluation.published import show_published
        show_published(path, folder)
        return
    check_packages("the evaluation", EVALUATION, "evaluation")
    check_ray(ray)
    with starting():
        from lora_compose.compose.evaluation.command import run_published
    if code := run_published(path, folder, processes, ray, smoke=smoke):
        raise typer.Exit(code)


@app.command(hidden=True)
@handle_errors(logging.ERROR)
def work(suite: str, folder: Annotated[Path, typer.Option("--out")], metrics: MetricsOption = None) -> None:
    """Take part in an evaluation, without a report: what `run --processes 2` starts twice."""
    from lora_compose.compose.evaluation.command import work_on

    work_on(suite, folder, _names(metrics))


def _names(metrics: list[str] | None) -> list[str]:
    return [name.strip() for text in metrics or [] for name in text.split(",") if name.strip()]


@app.command()
@handle_errors(logging.ERROR)
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of an evaluation, finished or not.")],
    baseline: Annotated[str | None, typer.Option(help="The method to compare with, instead of the suite's.")] = None,
) -> None:
    """Write the report of an evaluation again, from its results."""
    check_packages("the evaluation", EVALUATION, "evaluation")
    with starting():
        from lora_compose.compose.evaluation.command import show_report
    show_report(folder, baseline)


@app.command()
@handle_errors(logging.ERROR)
def compare(
    first: Annotated[Path, typer.Argument(help="Folder of an evaluation.")],
    second: Annotated[Path, typer.Argument(help="Folder of another evaluation.")],
) -> None:
    """Show what is better in a second evaluation, with intervals."""
    check_packages("the evaluation", EVALUATION, "evaluation")
    with starting():
        from lora_compose.compose.evaluation.command import compare_folders
    compare_folders(first, second)


@app.command()
@handle_errors(logging.ERROR)
def failures(
    folder: Annotated[Path, typer.Argument(help="Folder of an evaluation, finished or not.")],
    method: Annotated[str, typer.Option(help="A row of its table.")],
    to: Annotated[
        Path | None, typer.Option("--out", help="File for the sheet; default: failures-METHOD.png in the folder.")
    ] = None,
) -> None:
    """Show how a method fails: counts by kind, and a sheet of examples."""
    check_packages("the evaluation", EVALUATION, "evaluation")
    with starting():
        from lora_compose.compose.evaluation.failures import show_failures
    show_failures(folder, method, to)
