"""The work of the host for a call: Python calls, and launched tensor operations."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from lora_compose.compose.benchmark.timing import arguments_of, call
from lora_compose.pipelines.methods import Settings


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
    """The work that a method adds to the plain pipeline.

    Attributes:
        first: In a first call with its concepts, without its steps.
        again: The same in later calls.
        step: In a step.
    """

    first: Work
    again: Work
    step: Work


def host_work(pipe: Any, settings: Settings, concepts: int) -> HostWork:
    """Counts calls of one step and of two, the plain pipeline's and the method's."""
    ours = arguments_of(pipe, settings, concepts)

    def counted(function: Callable[[], object]) -> Work:
        return Work(_python_calls(function), _operations(function))

    def work(steps: int, arguments: dict[str, Any]) -> Work:
        return counted(lambda: call(pipe, steps, arguments))

    def first() -> None:
        pipe.banks.clear()
        call(pipe, 1, ours)

    work(1, {})  # what is computed once
    plain = [work(steps, {}) for steps in (1, 2)]
    new = counted(first)
    later = [work(steps, ours) for steps in (1, 2)]
    step = later[1] - later[0] - (plain[1] - plain[0])
    return HostWork(new - plain[0] - step, later[0] - plain[0] - step, step)


def _python_calls(function: Callable[[], object]) -> int:
    found = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal found
        found += event == "call"

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(before)
    return found


class _Operations(TorchDispatchMode):
    found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        returned = func._schema.returns
        views = [one for one in returned if one.alias_info is not None and not one.alias_info.is_write]
        self.found += not views and not func._schema.name.startswith("aten::empty")
        return func(*args, **(kwargs or {}))


def _operations(function: Callable[[], object]) -> int:
    with _Operations() as operations:
        function()
    return operations.found
