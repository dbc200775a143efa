"""Processes that share work and are killed: `from killing import kill_at_work`."""

import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil


def kill_at_work(start: Callable[[], BaseProcess], claims: Path, steady: BaseProcess) -> None:
    """Starts a process, and kills it with SIGKILL as soon as it has claimed work.

    Args:
        start: Starts it.
        claims: The folder of claims.
        steady: Another process, which is held meanwhile; else it might be done before.
    """
    held = psutil.Process(steady.pid)
    held.suspend()
    victim = start()

    def has_a_claim() -> bool:
        found = (path.read_text().split() for path in claims.glob("*") if path.exists())
        return any(words[-1:] == [str(victim.pid)] for words in found)

    while not has_a_claim():
        assert victim.exitcode is None
        time.sleep(0.01)
    held.resume()
    victim.kill()
    victim.join()
    assert victim.exitcode == -signal.SIGKILL
