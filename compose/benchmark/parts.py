"""The work of the host for a call, split into named parts by the module that a Python function stands in.

A function of another library counts to the part that called it.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from rich.table import Table

from lora_compose import attention, pipelines
from lora_compose.attention.device import uncompiled
from lora_compose.compose.benchmark.host import Operations, Work, profiled
from lora_compose.compose.benchmark.tables import new_table
from lora_compose.compose.benchmark.timing import Job, open_with_concepts, way_of
from lora_compose.compose.support.terminal import bar_over

PARTS = ("planning", "prompts", "bank", "gates and masks", "loop", "passes", "decoding")
"""The parts of a call; `passes` are the forward passes of the model."""

_MODULES: Mapping[str, str] = {
    "attention": "bank",
    "attention/gates.py": "gates and masks",
    "attention/joint_regions.py": "gates and masks",
    "attention/masks.py": "gates and masks",
    "attention/regions.py": "gates and masks",
    "attention/sites.py": "gates and masks",
    "attention/text_bias.py": "gates and masks",
    "attention/norm_regions.py": "gates and masks",
    "pipelines/calls": "planning",
    "pipelines/concepts": "planning",
    "pipelines/control": "planning",
    "pipelines/denoising/loop.py": "loop",
    "pipelines/denoising/guidance.py": "loop",
    "pipelines/denoising/sampler.py": "loop",
    "pipelines/denoising/denoiser.py": "gates and masks",
    "pipelines/denoising/prepared_pass.py": "gates and masks",
    "pipelines/images": "decoding",
    "pipelines/methods": "gates and masks",
    "pipelines/scene": "gates and masks",
    "pipelines/text": "prompts",
}
"""Modules and folders by part; of several that contain a function the longest counts, all others are the caller's."""

_ROOTS = {name: str(Path(package.__path__[0]).resolve()) for name, package in
          (("attention", attention), ("pipelines", pipelines))}  # fmt: skip
_PLACES = sorted(((_ROOTS[where.partition("/")[0]] + where[where.find("/") :] * ("/" in where), part)
                  for where, part in _MODULES.items()), key=lambda pair: -len(pair[0]))  # fmt: skip


@dataclass(frozen=True)
class Split:
    """Python calls and operations on tensors of one call, by part; calls before the first part are planning."""

    new: Mapping[str, Work]
    again: Mapping[str, Work]


def split(pipe: Any, function: Callable[[], object]) -> Split:
    """Counts a call with new concepts, and one with those of the call before."""

    def anew() -> None:
        pipe.banks.clear()
        function()

    function()  # what is computed once
    return Split(_counted(pipe, anew), _counted(pipe, function))


def _counted(pipe: Any, function: Callable[[], object]) -> Mapping[str, Work]:
    calls, tracker = _Tracker(pipe), _Tracker(pipe)
    with profiled(calls.seen):
        function()
    with Operations(lambda: tracker.stack[-1]) as operations, profiled(tracker.seen):
        function()
    return {part: Work(calls.calls[part], operations.counts[part]) for part in PARTS}


class _Tracker:
    """Follows Python calls, and knows the part that runs now."""

    def __init__(self, pipe: Any) -> None:
        self.calls: Counter[str] = Counter()
        self.stack = ["planning"]
        self._whole = {uncompiled(pipe.model).forward.__code__: "passes"}
        if getattr(pipe, "vae", None) is not None:
            self._whole[_innermost(type(pipe.vae).decode).__code__] = "decoding"

    def seen(self, frame: FrameType, event: str, _argument: object) -> None:
        if event == "call":
            self.stack.append(self._part(frame.f_code))
            self.calls[self.stack[-1]] += 1
        elif event == "return" and len(self.stack) > 1:  # the function that started the profile returns as well
            self.stack.pop()

    def _part(self, code: CodeType) -> str:
        """Passes contain all that they call."""
        now = self.stack[-1]
        return now if now == "passes" else self._whole.get(code) or _part_of(code.co_filename) or now


@cache
def _part_of(file: str) -> str | None:
    file = str(Path(file).resolve())
    return next((part for place, part in _PLACES if file == place or file.startswith(place + "/")), None)


def _innermost(function: Any) -> Any:
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


@dataclass(frozen=True)
class SplitRow:
    """The parts of a call with a method (None: without concepts)."""

    method: str | None
    concepts: int
    split: Split


def split_cells(cells: Sequence[tuple[str, int]], plain: Job) -> list[SplitRow]:
    """Splits whole calls of one step, decoding included: the plain pipeline's, and those of methods."""
    pipe = open_with_concepts(replace(plain, concepts=max(number for _, number in cells)))

    def row(cell: tuple[str | None, int]) -> SplitRow:
        job = replace(plain, method=cell[0], concepts=cell[1])
        return SplitRow(*cell, split(pipe, way_of(pipe, job, output_type="np")))

    return bar_over("counting parts", [(None, 0), *cells], row)


def parts_table(rows: Sequence[SplitRow], what: str) -> Table:
    """Python calls and operations by part."""
    table = new_table(
        f"Counted: {what}; Python calls, and operations on tensors in brackets, of a whole call of one step by part: "
        "with new concepts, and with those of the call before",
        ["method", "N", "call", *PARTS],
    )
    for row in rows:
        for when, works in (("new", row.split.new), ("again", row.split.again)):
            cells = (f"{work.python_calls} ({work.operations})" for work in works.values())
            table.add_row(row.method or "plain", str(row.concepts), when, *cells)
    return table
