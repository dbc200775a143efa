"""Workers on a Ray cluster, whose machines share no folder.

One worker (a Ray actor) per GPU, or per share of CPUs, opens a model once and is then called again and again. Files
travel once to each node, through Ray's object store. If a worker dies, another one repeats its call.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import numpy as np
import ray  # pyright: ignore[reportMissingImports]
import torch
from ray.exceptions import RayError, RayTaskError  # pyright: ignore[reportMissingImports]
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # pyright: ignore[reportMissingImports]

from lora_compose.compose.cluster.packing import Node, Packer
from lora_compose.compose.files.claims import LOOK_AGAIN, Claim, Claims
from lora_compose.compose.generate.machine import versions
from lora_compose.compose.support.errors import error_text
from lora_compose.compose.support.folders import hold, remove
from lora_compose.compose.support.terminal import echo, err

TRIES = 3
"""Number of workers that die of a call, or one after the other before they are open, before it is given up."""

PATIENCE = 300.0
"""Seconds without room for any worker after which the driver gives up."""

Opening = Callable[[Node], Any]
"""Opens what a worker works with. Pickled: a function of a module, or a `partial` of one."""

Function = Callable[..., Any]
"""A function of a module: called on a node with what has been opened, the node, and the arguments of a call."""


class Ended(NamedTuple):
    """A call that has ended: its result, or why it failed."""

    name: str
    result: Any
    error: str | None


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
        """Its node, the node's folder, and the versions of its packages."""
        return self._at, str(self._node.folder), versions()

    def open(self, opening: Opening, threads: int) -> str | None:
        """Opens what it works with; returns the error, or None."""
        torch.set_num_threads(threads)
        try:
            self._opened = opening(self._node)
        except Exception as error:  # models and libraries may raise anything
            return self._node.as_given(error_text(error))
        return None

    def call(self, function: Function, arguments: tuple) -> tuple[Any, str | None]:
        """Calls a function; returns its result, and its error."""
        try:
            return function(self._opened, self._node, *arguments), None
        except Exception as error:  # models and libraries may raise anything
            return None, self._node.as_given(error_text(error))


@dataclass(frozen=True)
class _Call:
    name: str
    function: Function
    arguments: tuple
    deaths: int = 0


class Pool:
    """Workers, each at one call at a time; a dead one is replaced where there is room.

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
        self._busy: dict[Any, tuple[Any, _Call]] = {}
        self._queue: deque[_Call] = deque()
        self._folders: dict[str, str] = {}
        self._unopened_deaths, self._seen = 0, time.monotonic()
        for _ in range(number):
            self._add()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def map(self, function: Function, tasks: Mapping[str, tuple]) -> Iterator[Ended]:
        """Calls a function with each task's further arguments, by name, in the order in which they end.

        Raises:
            ValueError: If what the workers need cannot be opened.
            OSError: If no worker is left.
        """
        self._queue.extend(_Call(name, function, arguments) for name, arguments in tasks.items())
        while self._queue or self._busy:
            yield from self._ended()

    def work(
        self,
        function: Function,
        claims: Claims,
        names: Iterable[str],
        start: Callable[[str], tuple | None],
        end: Callable[[Ended, Claim], None],
    ) -> None:
        """Does pieces of work under their claims until all have been done here or by others, as `Claims.work`.

        `start` gives the arguments for a piece, or None if another process has done it meanwhile; `end` stores its
        result. Pieces that others have claimed come last.

        Raises:
            ValueError: As `map`.
            OSError: As `map`, or if nothing can be written into the folder of claims.
        """
        fresh, taken = deque(names), list[str]()
        held: dict[str, tuple[ExitStack, Claim]] = {}
        with ExitStack() as stacks:
            stacks.callback(lambda: [stack.close() for stack, _ in held.values()])
            while fresh or taken or held:
                while fresh and self._idle and not self._queue:
                    name = fresh.popleft()
                    with ExitStack() as stack:
                        claim = stack.enter_context(claims.claim(name))
                        if claim is None:
                            taken.append(name)
                        elif (arguments := start(name)) is not None:
                            held[name] = stack.pop_all(), claim
                            self._queue.append(_Call(name, function, arguments))
                            self._begin()
                if not fresh:
                    fresh, taken = deque(taken), []
                for ended in self._ended():
                    stack, claim = held.pop(ended.name)
                    with stack:
                        end(ended, claim)

    def close(self) -> None:
        """Ends the workers and removes their files; those of dead nodes when a worker is next on their machine."""
        workers = [*self._placing.values(), *self._opening.values(), *self._idle]
        for worker in [*workers, *(worker for worker, _ in self._busy.values())]:
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

    def _begin(self) -> None:
        while self._queue and self._idle:
            call, worker = self._queue.popleft(), self._idle.pop()
            self._busy[worker.call.remote(call.function, call.arguments)] = worker, call

    def _ended(self) -> Iterator[Ended]:
        """Looks after the workers for a moment; yields a call that has ended meanwhile."""
        self._begin()
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

    def _called(self, ref: Any, worker: Any, call: _Call) -> Iterator[Ended]:
        try:
            result, error = ray.get(ref)
        except RayTaskError as wrong:  # what a node cannot unpickle, because its version differs
            result, error = None, error_text(wrong.cause or wrong)
        except RayError as wrong:  # the worker or its node has died, or cannot be reached
            ray.kill(worker)
            self._add()
            again = replace(call, deaths=call.deaths + 1)
            if again.deaths < TRIES:
                echo("warning: a worker has died; another does its work", style="yellow", to=err)
                self._queue.appendleft(again)
            else:
                yield Ended(call.name, None, f"{TRIES} workers have died of it: {error_text(wrong)}")
            return
        self._idle.append(worker)
        yield Ended(call.name, result, error)

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
