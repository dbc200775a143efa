"""`lora-compose evaluate`: runs a suite in one process or several, and writes its report."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from lora_compose.compose.evaluation.comparison import compare_runs
from lora_compose.compose.evaluation.planning import make_plan
from lora_compose.compose.evaluation.report import write_report
from lora_compose.compose.evaluation.runner import CLAIMS, evaluate, is_done
from lora_compose.compose.evaluation.suite import read_suite
from lora_compose.compose.files.claims import Claims
from lora_compose.compose.support.terminal import FAILED, bar, err, out, say

CHILD = Path(__file__).with_name("child.py")
GRACE = 10  # seconds that a process has to end by itself


def run_suite(suite: str, folder: Path | None = None, processes: int | None = None) -> int:
    """Generates and scores all images of a suite and writes the report; a rerun resumes, further processes join in.

    Args:
        suite: A suite file, or the name of a shipped suite.
        folder: Output folder; None means outputs/evaluation/NAME.
        processes: Number of processes; None means one per GPU, or as in the suite.

    Returns:
        The exit code: 0; that of a process that found an error; or 1 if images are missing.

    Raises:
        ValueError: For suites that cannot be read.
        OSError: If all processes were killed.
    """
    asked = read_suite(suite)
    to = folder or Path("outputs/evaluation") / asked.name
    if os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) != "0":
        evaluate(asked, to)  # the first process of the machine is the one that talks
        return 0
    plan = make_plan(asked)
    say(f"{asked.name}: {len(plan.batches)} batches of {asked.batch_size} images, in {to}", to=err)

    def done() -> int:
        return sum(is_done(to, planned) for planned in plan.batches)

    with bar("evaluating", len(plan.batches)) as on_progress:
        if (number := processes or _processes(asked.processes, asked.device)) > 1:
            code = _launch([suite, "--out", str(to)], number, asked.threads or 1, lambda: on_progress(done()))
            if code and done() < len(plan.batches):
                return code
        else:
            evaluate(asked, to, on_progress)
    with Claims(to / CLAIMS).claim("report") as claim:
        if claim is None:
            say(f"Another process of this evaluation writes the report, in {to}.")
        else:
            say_report(to)
    if left := len(plan.batches) - done():
        say(f"{left} batches failed; the report lists why. The same command retries them.", style="red", to=err)
    return FAILED if left else 0


def work_on(suite: str, folder: Path) -> None:
    """Takes part in an evaluation, without a report."""
    evaluate(read_suite(suite), folder)


def compare_folders(first: Path, second: Path) -> None:
    """Compares two evaluations and shows the differences."""
    out.print(compare_runs(first, second))


def say_report(folder: Path, baseline: str | None = None) -> None:
    """Writes the report of an evaluation and prints its path."""
    written = write_report(folder, baseline)
    say(f"The report: {written.html}", style="bold")
    say(f"As a table: {written.markdown}; for pandas: {written.images}, {written.concepts}, {written.summary}")


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
        0, or the exit code of a process that reported an error.

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
