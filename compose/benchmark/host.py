"""The work of the host for a call: Python calls, launched tensor operations, and CPU time."""

import gc
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from lora_compose.compose.benchmark.outside import spent
from lora_compose.compose.benchmark.timing import Job, Way, way_of

_TIMED = 10  # calls, of which the quickest counts: the others were disturbed


@dataclass(frozen=True)
class Work:
    """Python calls, and operations on tensors that compute or copy something."""

    python_calls: int
    operations: int

    def __sub__(self, other: "Work") -> "Work":
        """The difference of two counts."""
        return Work(self.python_calls - other.python_calls, self.operations - other.operations)


@dataclass(frozen=True)
class HostWork:
    """The work that a method adds to the plain pipeline in a call, without its steps, and in a step.

    `first` is with new concepts, `again` with those of the call before. `first_ms` and `again_ms` are CPU time of a
    call of one step, without forward passes of the model; with updates, backward passes are in them.
    """

    first: Work
    again: Work
    step: Work
    first_ms: float
    again_ms: float


def host_work(pipe: Any, job: Job) -> HostWork:
    """Counts calls of one step and of two, the plain pipeline's and those of a job's method."""

    def way(method: str | None, steps: int = 1) -> Way:
        return way_of(pipe, replace(job, method=method, steps=steps))

    def anew() -> None:
        pipe.banks.clear()
        ours()

    def work(function: Callable[[], object]) -> Work:
        return Work(python_calls(function), operations(function))

    plain, ours = way(None), way(job.method)
    plain()  # what is computed once
    one_step, two_steps = work(plain), work(way(None, 2))
    new = work(anew)
    later, more = work(ours), work(way(job.method, 2))
    step = more - later - (two_steps - one_step)
    usual, again, first = _quickest(pipe, plain, ours, anew)
    return HostWork(new - one_step - step, later - one_step - step, step, first - usual, again - usual)


def _quickest(pipe: Any, *functions: Callable[[], object]) -> list[float]:
    """Milliseconds of CPU time of each function outside of the model, called in turn; the least of all rounds."""
    rounds = [
        [spent(pipe.model, function, [time.thread_time])[0].outside for function in functions] for _ in range(_TIMED)
    ]
    return [1000 * min(times) for times in zip(*rounds, strict=True)]


def python_calls(function: Callable[[], object]) -> int:
    """How many Python functions, and steps of generators, a function calls.

    The same at any time in a process: patterns are compiled anew, and finalizers of what was used before do not count.
    """
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    re.purge()
    gc.collect()
    gc.disable()
    try:
        with profiled(count):
            function()
    finally:
        gc.enable()
    return calls


@contextmanager
def profiled(seen: Callable[[FrameType, str, object], None]) -> Iterator[None]:
    """Tells a function of all that `sys.setprofile` reports in this block."""
    before = sys.getprofile()
    sys.setprofile(seen)
    try:
        yield
    finally:
        sys.setprofile(before)


def _computes(operation: Any) -> bool:
    """Whether an operation computes or copies something: no views, by their schema, and no `_unsafe_view`."""
    returned = operation._schema.returns
    views = [value for value in returned if value.alias_info is not None and not value.alias_info.is_write]
    return not views and not operation._schema.name.startswith(("aten::empty", "aten::_unsafe_view"))


class Operations(TorchDispatchMode):
    """Counts operations that compute or copy something, by what `part` returns when they run."""

    def __init__(self, part: Callable[[], str]) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._part = part

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        self.counts[self._part()] += _computes(func)
        return func(*args, **(kwargs or {}))


def operations(function: Callable[[], object]) -> int:
    """How many operations a function runs that compute or copy something."""
    with Operations(lambda: "") as operations:
        function()
    return operations.counts.total()
