"""Generates and scores the batches of a plan; resumes after an interruption and keeps finished results.

Any number of processes, on any machines that share the folder, can work on it: each claims one batch at a time. They
may start late, or end at any time.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from lora_compose.compose.cluster.opening import Cluster, workers
from lora_compose.compose.cluster.packing import Node, Packer, Parcel
from lora_compose.compose.cluster.work import Failure, OnProgress, Opening, Progress, Workers
from lora_compose.compose.evaluation.batches import Batch, run_of
from lora_compose.compose.evaluation.packing import pack
from lora_compose.compose.evaluation.planning import Todo, open_plan
from lora_compose.compose.evaluation.results import CLAIMS
from lora_compose.compose.evaluation.suite import Suite, moved_suite
from lora_compose.compose.evaluation.worker import Worker
from lora_compose.compose.files.claims import PATIENCE, Claims
from lora_compose.compose.generate.early import early_problems
from lora_compose.compose.generate.model_facts import facts_of
from lora_compose.compose.generate.processes import own_device


def evaluate(
    suite: Suite,
    out: Path,
    on_progress: OnProgress | None = None,
    *,
    patience: float = PATIENCE,
    cluster: Cluster | None = None,
) -> None:
    """Generates and scores the remaining batches of a suite, until this or other processes have finished all.

    Finished batches are not repeated unless they are damaged. A batch that fails is tried once. Without a heartbeat for
    `patience` seconds, the batch of another process is taken over. `on_progress` gets the number of finished batches of
    all processes. On a cluster the results are the same, and are stored by this process.

    Raises:
        ValueError: If something in the suite cannot work; nothing has been made then.
        OSError: If results cannot be written; those so far are kept. If there is no such cluster, or no worker is left.
    """
    report = on_progress or (lambda *args: None)
    plan = open_plan(suite, out)
    left = {key: todo for key, todo in plan.items() if todo.is_left()}
    progress = Progress(report, len(plan) - len(left))
    report(progress.done)
    if not left:
        return
    check_early_each(suite, [todo.batch for todo in left.values()], here=cluster is None)
    report(progress.done, "opening the model")
    with workers(partial(_opening, suite), suite.device, suite.threads, cluster) as opened:
        _check(opened, left)
        report(progress.done, "evaluating")
        opened.work(Worker.do, Claims(out / CLAIMS, patience), left, progress)


def _opening(suite: Suite, packer: Packer | None) -> Opening:
    return partial(_open, suite, Parcel() if packer is None else pack(packer, suite))


def _open(suite: Suite, files: Parcel, node: Node) -> Worker:
    return Worker.open(moved_suite(suite, node.unpack(files)), own_device(suite.device))


def check_early_each(suite: Suite, batches: Iterable[Batch], *, here: bool = True) -> None:
    """Checks a batch of each scene and arm, as far as no model is needed for it.

    Args:
        here: Whether they are made on this machine, whose memory is judged.

    Raises:
        ValueError: With all problems.
    """
    kinds, facts = {_kind(batch): batch for batch in batches}.values(), facts_of(suite.model)
    _refuse([(batch, error) for batch in kinds for error in early_problems(run_of(suite, batch), facts, here=here)])


def _check(opened: Workers, left: Mapping[str, Todo]) -> None:
    """Plans a batch of each scene and arm; raises ValueError with all problems."""
    tasks = {todo.planned.key: (todo.batch,) for todo in {_kind(todo.batch): todo for todo in left.values()}.values()}
    wrong = {
        key: [result.error for result in results if isinstance(result, Failure)]
        for key, results in opened.map(Worker.check, tasks)
    }
    _refuse([(left[key].batch, error) for key in tasks for error in wrong[key]])


def _kind(batch: Batch) -> tuple[str, str, str | None]:
    """What batches have in common that differ in their seeds."""
    return batch.scene.name, batch.arm.name, batch.arm.alone


def _refuse(problems: Sequence[tuple[Batch, str]]) -> None:
    if problems:
        texts = [f"scene {batch.scene.name!r}, {batch.arm.name}: {error}" for batch, error in problems]
        raise ValueError("\n".join(["the suite cannot be evaluated:", *texts]))
