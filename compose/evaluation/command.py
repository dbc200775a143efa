"""A suite run in one process or several, and its report: what `lora-compose evaluate` does."""

import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import torch
import typer

from lora_compose.compose.evaluation.comparison import compare_runs
from lora_compose.compose.evaluation.planning import make_plan
from lora_compose.compose.evaluation.report import write_report
from lora_compose.compose.evaluation.runner import evaluate, is_done
from lora_compose.compose.evaluation.suite import read_suite
from lora_compose.compose.support.terminal import FAILED, bar, err, out, say

CHILD = Path(__file__).with_name("child.py")
GRACE = 10  # seconds that the first process has to fail by itself when another one has failed


def run_suite(suite: str, folder: Path | None = None, processes: int | None = None) -> bool:
    """Generates and scores the images of a suite, writes the report, and returns whether nothing failed.

    Args:
        suite: A suite file, or the name of a shipped suite.
        folder: Where to; what is finished there is not made again.
        processes: How many; None is one per GPU, or as in the suite.

    Raises:
        ValueError: For suites that cannot be read.
        ChildProcessError: If a process was killed.
    """
    asked = read_suite(suite)
    to = folder or Path("outputs/evaluation") / asked.name
    number = processes or _processes(asked.processes, asked.device)
    if number > 1 and "WORLD_SIZE" not in os.environ:
        _launch([suite, *(["--out", str(folder)] if folder else [])], number, asked.threads or 1)
        return True
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if rank > 0:
        evaluate(asked, to)
        return True
    plan = make_plan(asked)
    say(f"{asked.name}: {len(plan.batches)} batches of {asked.batch_size} images, in {to}", to=err)
    with bar("evaluating", math.ceil(len(plan.batches) / world)) as on_progress:
        evaluate(asked, to, on_progress)
    say_report(to)
    if left := sum(not is_done(to, planned) for planned in plan.batches):
        say(f"{left} batches failed; the report lists why. The same command retries them.", style="red", to=err)
    return not left


def compare_folders(first: Path, second: Path) -> None:
    """Shows what is better in the second evaluation than in the first."""
    out.print(compare_runs(first, second))


def say_report(folder: Path, baseline: str | None = None) -> None:
    """Writes the report of an evaluation and says where it is."""
    written = write_report(folder, baseline)
    say(f"The report: {written.html}", style="bold")
    say(f"As a table: {written.markdown}; for pandas: {written.pictures}, {written.concepts}, {written.summary}")


def _processes(wanted: int, device: str | None) -> int:
    """How many processes: one for each GPU, or what the suite wants where there are so many processors."""
    if torch.cuda.is_available() and device in (None, "cuda"):
        return torch.cuda.device_count()
    return 1 if device not in (None, "cpu") else min(wanted, os.cpu_count() or 1)


def _launch(arguments: Sequence[str], number: int, threads: int) -> None:
    """The same command in several processes, with the variables by which `accelerate launch` tells them who they are.

    Not by `accelerate launch` itself, which buries the message of a failed process under tracebacks of its own.
    """
    command = [sys.executable, "-c", CHILD.read_text("utf-8"), "evaluate", "run", *arguments, "--processes", "1"]
    shared = {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    with ExitStack() as stack:
        told = [stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8")) for _ in range(number)]
        started: list[subprocess.Popen] = []
        stack.callback(_stop, started)
        for rank in range(number):
            environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            # The first one talks; of the others one hears only what went wrong, and once.
            speech = told[rank] if rank else None
            started.append(subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stderr=speech))
        while any(process.poll() is None for process in started) and not any(process.poll() for process in started):
            time.sleep(0.2)
        if killed := next((process for process in started if (process.returncode or 0) < 0), None):
            raise ChildProcessError(_killed(-killed.returncode))
        with suppress(subprocess.TimeoutExpired):  # what is wrong for one is mostly wrong for the first one, too
            started[0].wait(GRACE)
        codes = [process.poll() for process in started]
        failed = next((rank for rank, code in enumerate(codes) if code), None)
        if failed is None:
            return
        told[failed].seek(0)
        sys.stderr.write(told[failed].read())
        raise typer.Exit(max(codes[failed] or 0, FAILED))


def _killed(number: int) -> str:
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    why = "; where memory runs out, the system does that: try fewer --processes" if name == "SIGKILL" else ""
    return f"a process of the evaluation was ended by {name}{why}. What is finished is kept; the same command resumes"


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


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        return any_port.getsockname()[1]
