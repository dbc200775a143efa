"""Workers on a Ray cluster, whose machines share no folder.

One worker (a Ray actor) per GPU, or per share of CPUs, opens a model once and is then called again and again. Files
travel once to each node, through Ray's object store. If a worker dies, another one repeats its call.
"""

import time
from collections import deque
from collections.abc import Iterator
from typing import Any, Self

import numpy as np
import ray  # pyright: ignore[reportMissingImports]
import torch
from ray.exceptions import RayError, RayTaskError  # pyright: ignore[reportMissingImports]
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # pyright: ignore[reportMissingImports]

from lora_compose.compose.cluster.packing import Node, Packer
from lora_compose.compose.cluster.work import LOOK_AGAIN, Call, Ended, Failure, Function, Opening, Workers, attempt
from lora_compose.compose.generate.machine import versions
from lora_compose.compose.support.errors import error_text
from lora_compose.compose.support.folders import hold, remove
from lora_compose.compose.support.terminal import echo, err

TRIES = 3
"""Number of workers that die of a call, or one after the other before they are open, before it is given up."""

PATIENCE = 300.0
"""Seconds without room for any worker after which the driver gives up."""


def object_packer() -> Packer:
    """Packs files into the object store, where nodes read them without a copy."""
    return Packer(lambda path: ray.put(np.fromfile(path, dtype=np.uint8)))


class RemoteWorker:
    """A worker on a node. Errors are returned as text, because a driver may be unable to unpickle them."""

    def __init__(self) -> None:
        context = ray.get_runtime_context()
        self._at = context.get_node_id()
        self._held = hold(f"{context.get_job_id()}-{self._at}")
        self._node = Node(self._held.path, ray.get)
        self._opened: Any = None

    def place(self) -> tuple[str, str, dict[str, str]]:
        """The worker's node, the node's folder, and the versions of its packages."""
        return self._at, str(self._node.folder), versions()

    def open(self, opening: Opening, threads: int) -> str | None:
        """Opens what it works with; returns the error, or None."""
        torch.set_num_threads(threads)
        try:
            self._opened = opening(self._node)
        except Exception as error:  # models and libraries may raise anything
            return self._node.as_given(error_text(error))
        return None

    def call(self, function: Function, arguments: tuple) -> list[Any]:
        """The results of a call."""
        results = attempt(function, self._opened, *arguments)
        return [Failure(self._node.as_given(it.error)) if isinstance(it, Failure) else it for it in results]


class Pool(Workers):
    """Workers on a cluster; a dead one is replaced where there is room.

    There is one per GPU by default ("cuda" or None as the device), or one per node if there are none. Each has as many
    CPU threads as this process unless told otherwise, because pixels depend on it.
    """

    def __init__(self, opening: Opening, device: str | None, threads: int | None, workers: int | None) -> None:
        cpus = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        gpus = int(ray.cluster_resources().get("GPU", 0)) if device in (None, "cuda") else 0
        number = workers or gpus or len(cpus)
        self._threads = threads or torch.get_num_threads()
        share = max(1, min(self._threads, max(cpus), sum(cpus) // number))
        self._needs = {"num_gpus": 1, "num_cpus": 0} if gpus else {"num_cpus": share}
        self._opening_function = opening
        self._placing: dict[Any, Any] = {}
        self._opening: dict[Any, Any] = {}
        self._idle: list[Any] = []
        self._busy: dict[Any, tuple[Any, Call, int]] = {}
        self._again: deque[tuple[Call, int]] = deque()  # calls of which workers have died, and how many
        self._folders: dict[str, str] = {}
        self._unopened_deaths, self._seen = 0, time.monotonic()
        for _ in range(number):
            self._add()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Ends the workers and removes their files; those of dead nodes when a worker is next on their machine."""
        busy = (worker for worker, *_ in self._busy.values())
        for worker in [*self._placing.values(), *self._opening.values(), *self._idle, *busy]:
            ray.kill(worker)

        remote: Any = ray.remote(num_cpus=0, max_retries=0)(remove)
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        removing = [
            remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(folder)
            for node, folder in self._folders.items()
            if node in alive
        ]
        if removing:
            ray.wait(removing, num_returns=len(removing), timeout=10)

    def _add(self) -> None:
        worker = ray.remote(RemoteWorker).options(scheduling_strategy="SPREAD", **self._needs).remote()
        self._placing[worker.place.remote()] = worker

    def is_free(self) -> bool:
        """Whether a worker has nothing to do."""
        return bool(self._idle) and not self._again

    def begin(self, call: Call) -> None:
        """Sends a call to a worker that has nothing to do."""
        self._begin(call, 0)

    def _begin(self, call: Call, deaths: int) -> None:
        worker = self._idle.pop()
        self._busy[worker.call.remote(call.function, call.arguments)] = worker, call, deaths

    def ended(self) -> Iterator[Ended]:
        """Looks after the workers for a moment; yields a call that has ended meanwhile."""
        while self._again and self._idle:
            self._begin(*self._again.popleft())
        self._check_patience()
        if not (coming := [*self._busy, *self._opening, *self._placing]):
            time.sleep(LOOK_AGAIN)
            return
        ready, _ = ray.wait(coming, num_returns=1, timeout=LOOK_AGAIN)
        for ref in ready:
            if ref in self._placing:
                self._placed(ref, self._placing.pop(ref))
            elif ref in self._opening:
                self._opened(ref, self._opening.pop(ref))
            else:
                yield from self._called(ref, *self._busy.pop(ref))

    def _placed(self, ref: Any, worker: Any) -> None:
        try:
            node, folder, node_versions = ray.get(ref)
        except RayError as error:
            self._replace_unopened(worker, error)
            return
        self._folders[node] = folder
        self._opening[worker.open.remote(self._opening_function, self._threads)] = worker
        if differ := sorted(name for name, own in versions().items() if node_versions.get(name) != own):
            names = ", ".join(differ)
            echo(f"warning: a node has another version of {names}; pixels may differ", style="yellow", to=err)

    def _opened(self, ref: Any, worker: Any) -> None:
        try:
            wrong = ray.get(ref)
        except RayError as error:
            self._replace_unopened(worker, error)
            return
        if wrong is not None:
            ray.kill(worker)
            raise ValueError(wrong)
        self._unopened_deaths = 0
        self._idle.append(worker)

    def _called(self, ref: Any, worker: Any, call: Call, deaths: int) -> Iterator[Ended]:
        try:
            results = ray.get(ref)
        except RayTaskError as wrong:  # what a node cannot unpickle, because its version differs
            results = [Failure(error_text(wrong.cause or wrong))]
        except RayError as wrong:  # the worker or its node has died, or cannot be reached
            ray.kill(worker)
            self._add()
            if deaths + 1 < TRIES:
                echo("warning: a worker has died; another does its work", style="yellow", to=err)
                self._again.appendleft((call, deaths + 1))
            else:
                yield call.name, [Failure(f"{TRIES} workers have died of it: {error_text(wrong)}")]
            return
        self._idle.append(worker)
        yield call.name, results

    def _replace_unopened(self, worker: Any, error: RayError) -> None:
        """Replaces a worker that has died before it was open, unless that has happened too often."""
        ray.kill(worker)
        self._unopened_deaths += 1
        if self._unopened_deaths < TRIES:
            self._add()
        elif not (self._busy or self._idle or self._opening or self._placing):
            raise ChildProcessError(f"{TRIES} workers have died before they had opened the model: {error_text(error)}")

    def _check_patience(self) -> None:
        if self._busy or self._idle or self._opening:
            self._seen = time.monotonic()
        elif time.monotonic() - self._seen > PATIENCE:
            raise ChildProcessError(
                "the cluster has no room for a worker. What is finished is kept; the same command resumes"
            )
