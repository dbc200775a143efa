"""An evaluation on a Ray cluster: machines that share no folder. Results come back to the driver, which stores them."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from PIL import Image

from lora_compose.compose.cluster.connecting import connected
from lora_compose.compose.cluster.packing import Node, Parcel, named_as
from lora_compose.compose.cluster.pool import Ended, Pool, object_packer
from lora_compose.compose.evaluation.batches import Batch, run_of
from lora_compose.compose.evaluation.packing import pack
from lora_compose.compose.evaluation.planning import Todo, open_plan
from lora_compose.compose.evaluation.results import CLAIMS, Failed
from lora_compose.compose.evaluation.runner import PATIENCE, OnProgress
from lora_compose.compose.evaluation.suite import Suite, moved_suite
from lora_compose.compose.evaluation.worker import Images, Result, Worker, failed, raise_problems, to_plan
from lora_compose.compose.files.claims import Claim, Claims
from lora_compose.compose.generate.processes import own_device
from lora_compose.pipelines.scene.scene import Run


def evaluate_on_ray(
    suite: Suite,
    out: Path,
    address: str,
    on_progress: OnProgress | None = None,
    *,
    workers: int | None = None,
    patience: float = PATIENCE,
) -> None:
    """Generates and scores the remaining batches of a suite on a Ray cluster, as `evaluate` does, which may join in.

    `address` is as `ray.init` takes it, "local" starts a cluster on this machine; by default there is a worker per GPU,
    or per node if there are none.

    Raises:
        ValueError: As `evaluate`.
        OSError: As `evaluate`, and if there is no such cluster, or no worker is left.
    """
    report = on_progress or (lambda *args: None)
    plan = open_plan(suite, out)
    left: dict[str, Todo] = {}
    for key, todo in plan.items():
        if (kept := todo.look()) is not None:
            kept.report()
            left[key] = todo
    done = len(plan) - len(left)
    if not left:
        report(done)
        return
    report(done, "opening the model on the cluster")
    with connected(address):
        opening = partial(_open, suite, pack(object_packer(), suite))
        with Pool(opening, suite.device, suite.threads, workers) as pool:
            _check(pool, left)
            report(done, "evaluating")
            _work(pool, suite, left, Claims(out / CLAIMS, patience), done, report)


def _check(pool: Pool, left: dict[str, Todo]) -> None:
    """Rehearses the batches that are left; raises ValueError with all problems."""
    unchecked = to_plan(todo.batch for todo in left.values())
    tasks = {str(number): (batch,) for number, batch in enumerate(unchecked)}
    problems = {int(ended.name): ended.error or ended.result for ended in pool.map(_problem, tasks)}
    raise_problems((batch, problems[number]) for number, batch in enumerate(unchecked))


def _work(pool: Pool, suite: Suite, left: dict[str, Todo], claims: Claims, done: int, report: OnProgress) -> None:
    def count() -> None:
        nonlocal done
        done += 1
        report(done)

    def start(key: str) -> tuple[Batch, Run, Sequence[Image.Image]] | None:
        todo = left[key]
        if (kept := todo.look()) is None:
            count()
            return None
        return todo.batch, run_of(suite, todo.batch), todo.images() if kept.made else ()

    def end(ended: Ended, claim: Claim) -> None:
        todo = left[ended.name]
        todo.keep(ended.result if ended.error is None else [failed(todo.batch, ended.error)], claim)
        count()

    pool.work(_do, claims, left, start, end)


def _open(suite: Suite, parcel: Parcel, node: Node) -> Worker:
    return Worker.open(moved_suite(suite, node.unpack(parcel)), own_device(suite.device))


def _here(worker: Worker, batch: Batch) -> Batch:
    """A batch whose scene names the images of this node."""
    return replace(batch, scene=worker.suite.scene(batch.scene.name))


def _problem(worker: Worker, node: Node, batch: Batch) -> str | None:
    problem = worker.problem(_here(worker, batch))
    return None if problem is None else node.as_given(problem)


def _do(worker: Worker, node: Node, batch: Batch, run: Run, images: Sequence[Image.Image]) -> list[Result]:
    """As `Worker.do`; records and errors name files as on the driver, where the run of the batch is `run`."""
    return [_as_given(result, node, run) for result in worker.do(_here(worker, batch), images)]


def _as_given(result: Result, node: Node, run: Run) -> Result:
    if isinstance(result, Images):
        return replace(result, made=tuple(named_as(image, run) for image in result.made))
    if isinstance(result, Failed):
        return result.model_copy(update={"error": node.as_given(result.error)})
    return result
