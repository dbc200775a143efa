"""The time between requests that each need another few of many loaded LoRAs: with PEFT in diffusers, and with methods.

The scene is that of github.com/huggingface/diffusers/issues/11816: all LoRAs are loaded before the first request, and
none is read again.
"""

import copy
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
from diffusers import ModularPipeline
from rich.table import Table
from safetensors.torch import save_file

from lora_compose.compose.benchmark.architectures import columns, without_boxes
from lora_compose.compose.benchmark.outside import Spent, spent
from lora_compose.compose.benchmark.tables import new_table
from lora_compose.compose.benchmark.timing import (
    Job,
    call,
    image_size,
    lora_tensors,
    open_with_concepts,
    size_and_guidance,
)
from lora_compose.compose.generate.guides import plain_pipeline
from lora_compose.compose.support.terminal import bar
from lora_compose.pipelines.formats.models import model_part
from lora_compose.pipelines.scene.scene import Concept

LOADED, ACTIVE, RANK = 57, 5, 16
PEFT = "set_adapters"
METHODS = {"regional": True, "merge": False}
"""Methods that are measured, and whether concepts have boxes in their requests."""
WAYS = (PEFT, *METHODS)
_CLOCKS = time.perf_counter, time.process_time


@dataclass(frozen=True)
class Between:
    """Medians over requests, in milliseconds, of one way to have the LoRAs of a request in the model.

    `clock` and `cpu` are what the LoRAs of a request add to what a request without LoRAs takes outside of forward
    passes, by the clock and in CPU time; `changing_*` is `set_adapters` alone, a part of it; `passes` are all
    forward passes of a request. `times` says how many times as much CPU time PEFT adds, request by request.
    """

    way: str
    clock: float
    cpu: float
    changing_clock: float
    changing_cpu: float
    passes: float
    times: float


@dataclass(frozen=True)
class ManyLoaded:
    """What was measured, with how many LoRAs loaded, and in how many requests by each way."""

    loaded: int
    active: int
    rank: int
    requests: int
    ways: Sequence[Between]


def measure_requests(job: Job, loaded: int, requests: int) -> ManyLoaded:
    """Makes requests of one step in turn: without LoRAs, with PEFT, with each method, and again with other LoRAs.

    Both pipelines share the weights of one model. A first round warms up. Raises ValueError for fewer LoRAs than are
    active in a request.
    """
    if loaded < ACTIVE:
        raise ValueError(f"a request has {ACTIVE} LoRAs, so at least {ACTIVE} must be loaded, not {loaded}")
    ours = open_with_concepts(replace(job, concepts=0))
    job, theirs = replace(job, size=image_size(ours, job.size)[0]), _sharing_weights(ours)
    _load(ours, theirs, loaded)
    rounds: list[dict[str | None, tuple[Spent, ...]]] = []
    with bar("requests", requests + 1) as on_progress:
        for turn in range(requests + 1):
            chosen = [(turn * ACTIVE + i) % loaded for i in range(ACTIVE)]
            rounds.append({way: _request(ours, theirs, job, way, chosen) for way in (None, *WAYS)})
            on_progress(turn + 1)
    return ManyLoaded(loaded, ACTIVE, RANK, requests, [_medians(way, rounds[1:]) for way in WAYS])


def _sharing_weights(pipe: Any) -> Any:
    """Plain diffusers' pipeline, whose denoiser has modules of its own around the same weights."""
    kind: Any = getattr(diffusers, type(pipe).__name__)  # a family's class has the name of diffusers' own
    if issubclass(kind, ModularPipeline):
        raise ValueError(f"PEFT in diffusers' modular pipelines is not measured; {pipe.family} has no other")
    weights = [*pipe.model.parameters(), *pipe.model.buffers()]
    denoiser = copy.deepcopy(pipe.model, {id(weight): weight for weight in weights})
    other = plain_pipeline(pipe, kind, **{model_part(pipe): denoiser})
    other.set_progress_bar_config(disable=True)
    return other


def _load(ours: Any, theirs: Any, loaded: int) -> None:
    """Loads random LoRAs into both pipelines, each under the name of its number."""
    part, dtype = model_part(ours), ours.model.dtype  # diffusers looks through all modules for it
    denoiser = getattr(theirs, part)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lora.safetensors"
        with bar("loading", loaded) as on_progress:
            for number in range(loaded):
                tensors = {name: it.to(dtype) for name, it in lora_tensors(ours, RANK, number).items()}
                save_file(tensors, path)
                ours.load_concept(path, name=_name(number))
                # as load_lora_weights does it: no numbers are drawn for factors that are read right after
                denoiser.load_lora_adapter(tensors, adapter_name=_name(number), prefix=part, low_cpu_mem_usage=True)
                path.unlink()
                on_progress(number + 1)


def _name(number: int) -> str:
    return f"lora{number}"


def _request(ours: Any, theirs: Any, job: Job, way: str | None, chosen: Sequence[int]) -> tuple[Spent, ...]:
    """One request: `Spent` by both clocks in the call, and in `set_adapters` before it."""
    given, denoiser = size_and_guidance(ours, job), getattr(theirs, model_part(ours))
    if way == PEFT:
        change = partial(theirs.set_adapters, [_name(number) for number in chosen])
        return *spent(denoiser, change, _CLOCKS), *spent(denoiser, lambda: call(theirs, job, given), _CLOCKS)
    arguments = {} if way is None else {"concepts": _concepts(ours, job, way, chosen), "method": way}
    return Spent(0, 0), Spent(0, 0), *spent(ours.model, lambda: call(ours, job, given | arguments), _CLOCKS)


def _concepts(pipe: Any, job: Job, way: str, chosen: Sequence[int]) -> list[Concept]:
    """The words and, for methods that need them, the columns of a request's concepts."""
    boxed = columns(ACTIVE, *image_size(pipe, job.size))
    places = boxed if METHODS[way] else without_boxes(boxed)
    return [place.model_copy(update={"name": _name(number)}) for place, number in zip(places, chosen, strict=True)]


def _medians(way: str, rounds: Sequence[dict[str | None, tuple[Spent, ...]]]) -> Between:
    def added(way: str, clock: int) -> list[float]:
        """Seconds that LoRAs add outside of passes, by request."""
        return [
            timed[way][clock].outside + timed[way][2 + clock].outside - timed[None][2 + clock].outside
            for timed in rounds
        ]

    def milliseconds(values: Sequence[float]) -> float:
        return 1000 * statistics.median(values)

    by_clock, by_cpu = (milliseconds([timed[way][clock].outside for timed in rounds]) for clock in (0, 1))
    times = statistics.median(peft / own for peft, own in zip(added(PEFT, 1), added(way, 1), strict=True))
    passes = milliseconds([timed[way][2].inside for timed in rounds])
    return Between(way, milliseconds(added(way, 0)), milliseconds(added(way, 1)), by_clock, by_cpu, passes, times)


def requests_table(swap: ManyLoaded, what: str) -> Table:
    """Milliseconds between requests by way, and how many times as long PEFT takes."""
    table = new_table(
        f"Measured: {what}; {swap.loaded} LoRAs of rank {swap.rank} on all attention layers are loaded, and each of "
        f"{swap.requests} requests in turn has another {swap.active}. What they add to a request without LoRAs, but "
        "for forward passes, in milliseconds by the clock and of CPU time; of it set_adapters alone; forward passes "
        "with these LoRAs; PEFT's CPU time as a multiple of this way's",
        ["method", "ms", "CPU ms", "set_adapters", "CPU ms", "passes", "PEFT's"],
    )
    for row in swap.ways:
        alone = (f"{row.changing_clock:.1f}", f"{row.changing_cpu:.1f}") if row.changing_cpu else ("-", "-")
        table.add_row(row.way, f"{row.clock:.1f}", f"{row.cpu:.1f}", *alone, f"{row.passes:.0f}", f"{row.times:.2f}")
    return table
