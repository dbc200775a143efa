"""`lora-compose evaluate`: run a suite, write its report again, compare two evaluations."""

import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from typer.core import TyperGroup

from lora_compose.compose.support.terminal import FAILED, bar, err, kindly, out, say

_EXTRA = "the evaluation needs a few more packages: pip install 'lora-compose[evaluation]' (missing: {})"


class _Suites(TyperGroup):
    """`evaluate SUITE` is `evaluate run SUITE`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands:
            args = ["run", *args]
        return super().resolve_command(ctx, args)


CHILD = Path(__file__).with_name("child.py")
GRACE = 10  # seconds that a process has to end by itself

app = typer.Typer(
    cls=_Suites,
    help="Score methods on many scenes and seeds: lora-compose evaluate SUITE.",
    no_args_is_help=True,
)


@app.command("run")
@kindly(logging.ERROR)
def run(
    suite: Annotated[str, typer.Argument(help="A suite file, YAML or JSON, or the name of a shipped suite.")],
    folder: Annotated[
        Path | None, typer.Option("--out", help="Output folder; default: outputs/evaluation/NAME. A rerun resumes.")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Number of processes; default: one per GPU, or as in the suite.")
    ] = None,
) -> None:
    """Generate and score all images of a suite and write the report. A rerun resumes; further processes join in."""
    _check_packages()
    from lora_compose.compose.evaluation.planning import make_plan
    from lora_compose.compose.evaluation.runner import CLAIMS, evaluate, is_done
    from lora_compose.compose.evaluation.suite import read_suite
    from lora_compose.compose.files.claims import Claims

    asked = read_suite(suite)
    to = folder or Path("outputs/evaluation") / asked.name
    if os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) != "0":
        evaluate(asked, to)  # the first process of the machine is the one that talks
        return
    plan = make_plan(asked)
    say(f"{asked.name}: {len(plan.batches)} batches of {asked.batch_size} images, in {to}", to=err)

    def done() -> int:
        return sum(is_done(to, planned) for planned in plan.batches)

    with bar("evaluating", len(plan.batches)) as on_progress:
        if (number := processes or _processes(asked.processes, asked.device)) > 1:
            code = _launch([suite, "--out", str(to)], number, asked.threads or 1, lambda: on_progress(done()))
            if code and done() < len(plan.batches):
                raise typer.Exit(code)
        else:
            evaluate(asked, to, on_progress)
    with Claims(to / CLAIMS).claim("report") as claim:
        if claim is None:
            say(f"Another process of this evaluation writes the report, in {to}.")
        else:
            _say_report(to)
    if left := len(plan.batches) - done():
        say(f"{left} batches failed; the report lists why. The same command retries them.", style="red", to=err)
        raise typer.Exit(FAILED)


@app.command(hidden=True)
@kindly(logging.ERROR)
def work(suite: str, folder: Annotated[Path, typer.Option("--out")]) -> None:
    """Take part in an evaluation, without a report: what `run --processes 2` starts twice."""
    from lora_compose.compose.evaluation.runner import evaluate
    from lora_compose.compose.evaluation.suite import read_suite

    evaluate(read_suite(suite), folder)


@app.command()
@kindly(logging.ERROR)
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of an evaluation, finished or not.")],
    baseline: Annotated[str | None, typer.Option(help="The method to compare with, instead of the suite's.")] = None,
) -> None:
    """Write the report of an evaluation again, from its stored results."""
    _check_packages()
    _say_report(folder, baseline)


@app.command()
@kindly(logging.ERROR)
def compare(
    first: Annotated[Path, typer.Argument(help="Folder of an evaluation.")],
    second: Annotated[Path, typer.Argument(help="Folder of another evaluation.")],
) -> None:
    """Show what is better in the second evaluation than in the first, with intervals."""
    _check_packages()
    from lora_compose.compose.evaluation.comparison import compare_runs

    out.print(compare_runs(first, second))


def _say_report(folder: Path, baseline: str | None = None) -> None:
    from lora_compose.compose.evaluation.report import write_report

    written = write_report(folder, baseline)
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
    """How many processes: one for each GPU, or what the suite wants where there are so many processors.

    One if a launcher (accelerate, torchrun, SLURM) has started several.
    """
    if any(int(os.environ.get(name) or 1) > 1 for name in ("WORLD_SIZE", "SLURM_NTASKS")):
        return 1
    if torch.cuda.is_available() and device in (None, "cuda"):
        return torch.cuda.device_count()
    return 1 if device not in (None, "cpu") else min(wanted, os.cpu_count() or 1)


def _launch(arguments: Sequence[str], number: int, threads: int, on_look: Callable[[], None]) -> int:
    """Starts processes that take part in an evaluation, and waits for them. If one dies, the others do its work.

    Returns:
        0, or the exit code of a process that found something wrong, which has been said then.

    Raises:
        OSError: If all were killed.
    """
    command = [sys.executable, "-c", CHILD.read_text("utf-8"), "evaluate", "work", *arguments]
    shared = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    with ExitStack() as stack:
        told = [stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8")) for _ in range(number)]
        started: list[subprocess.Popen] = []
        stack.callback(_stop, started)
        for rank, speech in enumerate(told):
            environment = {**os.environ, **shared, "LOCAL_RANK": str(rank)}
            started.append(subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stderr=speech))
        running, killed = list(started), 0
        while running:
            time.sleep(0.2)
            on_look()
            for process in [process for process in running if process.poll() is not None]:
                running.remove(process)
                if process.returncode < 0:
                    killed += 1
                    say(f"warning: {_killed(-process.returncode)}", style="yellow", to=err)
        if killed == number:
            raise ChildProcessError("no process is left. What is finished is kept; the same command resumes")
        failed = next((rank for rank, process in enumerate(started) if process.returncode > 0), None)
        if failed is None:
            return 0
        told[failed].seek(0)  # what is wrong for one is mostly wrong for all, and said once
        sys.stderr.write(told[failed].read())
        return started[failed].returncode


def _killed(number: int) -> str:
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    why = "; where memory runs out, the system does that: try fewer --processes" if name == "SIGKILL" else ""
    return f"a process of the evaluation was ended by {name}{why}. The others do its work"


def _stop(processes: Sequence[subprocess.Popen]) -> None:
    """Ends processes that would wait for one that is gone."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
