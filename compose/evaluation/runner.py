"""Generates and scores the batches of a plan; resumes after an interruption and keeps finished results.

Any number of processes, on any machines that share the folder, can work on it: each claims one batch at a time. They
may start late, or end at any time.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

from lora_compose.compose.evaluation.planning import Todo, open_plan
from lora_compose.compose.evaluation.results import CLAIMS, is_done
from lora_compose.compose.evaluation.suite import Suite
from lora_compose.compose.evaluation.worker import Worker, raise_problems, to_plan
from lora_compose.compose.files.claims import Claim, Claims
from lora_compose.compose.generate.processes import own_device

PATIENCE = 60.0
"""Seconds without a heartbeat after which a process of an evaluation counts as dead."""

OnProgress = Callable[..., None]
"""Called with the number of finished batches, fractions included, and on a cluster sometimes a new text."""


def evaluate(suite: Suite, out: Path, on_progress: OnProgress | None = None, *, patience: float = PATIENCE) -> None:
    """Generates and scores the remaining batches of a suite, until this or other processes have finished all.

    Finished batches are not repeated unless they are damaged. A batch that fails is tried once. Without a heartbeat for
    `patience` seconds, the batch of another process is taken over. `on_progress` gets the number of finished batches of
    all processes.

    Raises:
        ValueError: If something in the suite cannot work; nothing has been made then.
        OSError: If results cannot be written; those so far are kept.
    """
    report = on_progress or (lambda done: None)
    left = open_plan(suite, out)
    worker, done = None, 0

    def do(key: str, claim: Claim) -> None:
        nonlocal worker, done
        todo = left[key]
        if (kept := todo.look()) is not None:
            kept.report()
            worker = worker or _open_checked(suite, left.values())
            images = todo.images() if kept.made else ()
            todo.keep(worker.do(todo.batch, images, lambda share: report(done + share)), claim)
        del left[key]
        done += 1
        report(done)

    report(done)
    Claims(out / CLAIMS, patience).work(list(left), do)


def _open_checked(suite: Suite, left: Iterable[Todo]) -> Worker:
    """Opens a worker, and checks all batches that are left.

    Raises:
        ValueError: If something cannot be opened, or something in the suite cannot work.
    """
    worker = Worker.open(suite, own_device(suite.device))
    unchecked = to_plan(todo.batch for todo in left if not is_done(todo.out, todo.planned))
    raise_problems((batch, worker.problem(batch)) for batch in unchecked)
    return worker
