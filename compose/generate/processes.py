"""Several processes on one machine that share work by claims: how many, on which device, started and looked after."""

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

from lora_compose.compose.generate.machine import choose_device
from lora_compose.compose.support.terminal import echo, err

CHILD = Path(__file__).with_name("child.py")
GRACE = 10  # seconds that a process has to end by itself


def local_rank() -> int:
    """Index of this process on this machine, set by its launcher (ours, accelerate, torchrun, SLURM); otherwise 0."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))


def own_device(wanted: str | None) -> str:
    """This process's device: the wanted one, or the GPU of its index. Raises ValueError if it is not there."""
    device = choose_device(wanted)
    return f"cuda:{local_rank() % torch.cuda.device_count()}" if device == "cuda" else device


def default_number(wanted: int, device: str | None) -> int:
    """The number of processes: one per GPU; on the CPU the wanted number, at most one per processor.

    One if a launcher (accelerate, torchrun, SLURM) has started several. A device of None is any.
    """
    if any(int(os.environ.get(name) or 1) > 1 for name in ("WORLD_SIZE", "SLURM_NTASKS")):
        return 1
    if torch.cuda.is_available() and device in (None, "cuda"):
        return torch.cuda.device_count()
    return 1 if device not in (None, "cpu") else min(wanted, os.cpu_count() or 1)


def launch(arguments: Sequence[str], number: int, threads: int, on_look: Callable[[], None]) -> int:
    """Starts processes that share work by claims, and waits for them. If one dies, the others do its work.

    Args:
        threads: CPU threads of each, unless OMP_NUM_THREADS says it.

    Returns:
        0, or the exit code of a process that failed, whose error output is shown.

    Raises:
        OSError: If all were killed.
    """
    command = [sys.executable, "-c", CHILD.read_text("utf-8"), *arguments]
    shared = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    with ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8")) for _ in range(number)]
        started: list[subprocess.Popen] = []
        stack.callback(_stop, started)
        for rank, output in enumerate(outputs):
            environment = {**os.environ, **shared, "LOCAL_RANK": str(rank)}
            started.append(subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stderr=output))
        running, killed, next_look = list(started), 0, 0.0
        while running:
            time.sleep(0.2)
            if (now := time.monotonic()) >= next_look:
                on_look()
                next_look = now + 1 + 10 * (time.monotonic() - now)  # it may look at very many files
            for process in [process for process in running if process.poll() is not None]:
                running.remove(process)
                if process.returncode < 0:
                    killed += 1
                    echo(f"warning: {_killed(-process.returncode)}", style="yellow", to=err)
        if killed == number:
            raise ChildProcessError("no process is left. What is finished is kept; the same command resumes")
        failed = next((rank for rank, process in enumerate(started) if process.returncode > 0), None)
        if failed is None:
            return 0
        outputs[failed].seek(0)  # mostly the same error in all processes: shown once
        sys.stderr.write(outputs[failed].read())
        return started[failed].returncode


def _killed(number: int) -> str:
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    why = "; where memory runs out, the system does that: try fewer --processes" if name == "SIGKILL" else ""
    return f"a process was ended by {name}{why}. The others do its work"


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
