"""Seconds and memory of real calls: of methods, and of PEFT's two ways to have several LoRAs in a model.

`python -m lora_compose.compose.benchmark.timing JOB` measures the memory of one call in a process of its own: JOB is a
JSON object with the fields of `Job`, and the answer on stdout is one as well.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

from lora_compose.compose.benchmark.architectures import PROMPT, RANK, as_called, attention_lora, columns
from lora_compose.compose.benchmark.memory import peak_memory
from lora_compose.compose.benchmark.structures import random_pipeline
from lora_compose.compose.benchmark.tables import MIB, new_table
from lora_compose.compose.generate.making import size_of
from lora_compose.compose.generate.models import open_model
from lora_compose.compose.support.names import STRUCTURES
from lora_compose.compose.support.savers import Saver, place
from lora_compose.compose.support.terminal import bar
from lora_compose.pipelines.formats.models import model_part
from lora_compose.pipelines.methods import make_method
from lora_compose.pipelines.scene.scene import Run, Scene

GUIDANCE = 5.0
_SCENE = Scene(prompt=PROMPT)


@dataclass(frozen=True)
class Job:
    """One call that is measured, of a model that is a path, a hub repository, `playground`, or one of `STRUCTURES`.

    The method is a name, one of `PEFT_WAYS`, or None for the plain pipeline; settings are those that differ from its
    defaults. `size` is width and height of the image; None is the model's own.
    """

    model: str
    device: str
    steps: int
    method: str | None = None
    concepts: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    savers: Sequence[Saver] = ()
    dtype: str = "float32"
    size: int | None = None


@dataclass(frozen=True)
class Timed:
    """Seconds of whole calls without decoding: medians over all rounds, ratios to the plain call of the same round.

    `preparation_seconds` are those before the first denoising step. `change_seconds`, beside the call, put the LoRAs
    into the model and take them out; 0 for methods, which do that in the call.
    """

    plain_seconds: float
    seconds: float
    preparation_seconds: float
    change_seconds: float
    ratio: float
    ratio_min: float
    ratio_max: float


def open_with_concepts(job: Job) -> Any:
    """Opens the model of a job and loads its concepts with random LoRAs into it, "concept 0" and so on."""
    if job.model in STRUCTURES:
        pipe = random_pipeline(job.model, job.device, getattr(torch, job.dtype))
        place(pipe, job.device, [Saver(name) for name in job.savers])
    else:
        run = Run(scene=_SCENE, model=job.model, device=job.device, dtype=job.dtype)
        pipe = open_model(run, [Saver(name) for name in job.savers])
    with tempfile.TemporaryDirectory() as folder:
        tensors = lora_tensors(pipe)
        for number, concept in enumerate(columns(job.concepts, *size_of(pipe, _SCENE))):
            path = Path(folder) / f"{number}.safetensors"  # concepts of one file would share its factors
            save_file(tensors, path)
            pipe.load_concept(path, name=concept.name, trigger=concept.trigger, class_word=concept.class_word)
    return pipe


def lora_tensors(pipe: Any, rank: int = RANK, seed: int = 0) -> dict[str, Tensor]:
    """A random LoRA for the attention layers of a pipeline's model, as a file has it and as PEFT takes it."""
    part, sides = model_part(pipe), {"lora_A": "down", "lora_B": "up"}
    lora = attention_lora(pipe.model, rank, seed).items()
    return {
        f"{part}.{name}.{key}.weight": getattr(factors, side) for name, factors in lora for key, side in sides.items()
    }


Way = Callable[[], "Call"]
"""Makes an image with some LoRAs, and says how long that took."""

PEFT_WAYS = ("set_adapters", "fuse_lora")
"""LoRAs in the plain pipeline, as diffusers and PEFT have them: beside the weights, and added to the weights."""


def way_of(pipe: Any, job: Job, output_type: str = "latent") -> Way:
    """How a job makes its image with what `open_with_concepts` gave, for as many concepts or more."""
    given = size_and_guidance(pipe, job)
    if job.method is None:
        return lambda: call(pipe, job, given, output_type)
    if job.method in PEFT_WAYS:
        return lambda: _call_with_peft(pipe, job)
    method = make_method(job.method, job.settings)
    concepts = as_called(pipe, method, job.concepts, *image_size(pipe, job.size))
    return lambda: call(pipe, job, {**given, "concepts": concepts, "method": method}, output_type)


def time_ways(pipe: Any, jobs: Sequence[Job], rounds: int, on_call: Callable[[], None] = lambda: None) -> list[Timed]:
    """Times plain, first job, second job, ..., plain, ..., after a call of each to warm up; tells `on_call` of each."""

    def made(way: Way) -> Call:
        call = way()
        on_call()
        return call

    ways = [way_of(pipe, job) for job in (replace(jobs[0], method=None), *jobs)]
    _, *timed = [[made(way) for way in ways] for _ in range(1 + rounds)]
    plain, *by_job = zip(*timed, strict=True)
    return [_medians(plain, calls) for calls in by_job]


def _medians(plain: Sequence["Call"], calls: Sequence["Call"]) -> Timed:
    ratios = [call.seconds / base.seconds for base, call in zip(plain, calls, strict=True)]
    median = statistics.median
    return Timed(
        median(call.seconds for call in plain), median(call.seconds for call in calls),
        median(call.preparation_seconds for call in calls), median(call.change_seconds for call in calls),
        median(ratios), min(ratios), max(ratios),
    )  # fmt: skip


def _call_with_peft(pipe: Any, job: Job) -> "Call":
    """A plain call with adapters of PEFT, which are loaded before it and removed after it."""
    names, tensors = [f"adapter{i}" for i in range(job.concepts)], lora_tensors(pipe)
    start = time.perf_counter()
    for name in names:
        pipe.model.load_lora_adapter(dict(tensors), adapter_name=name, prefix=model_part(pipe))
    try:
        pipe.set_adapters(names)
        if job.method == "fuse_lora":
            pipe.fuse_lora(adapter_names=names)
        loaded = time.perf_counter()
        result = call(pipe, job, size_and_guidance(pipe, job))
        begun = time.perf_counter()
        if job.method == "fuse_lora":
            pipe.unfuse_lora()
    finally:
        pipe.unload_lora_weights()
    return replace(result, change_seconds=loaded - start + time.perf_counter() - begun)


def peak_bytes(job: Job) -> int:
    """Peak memory of a call, model and LoRAs included, in a process of its own; ChildProcessError if that fails."""
    command = [sys.executable, "-m", "lora_compose.compose.benchmark.timing", json.dumps(asdict(job))]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode != 0:
        raise ChildProcessError(f"the memory of {job} could not be measured:\n{ran.stderr.strip()[-2000:]}")
    return json.loads(ran.stdout.splitlines()[-1])["peak_bytes"]


@dataclass(frozen=True)
class TimedRow:
    """Seconds and memory of a method, or of one of `PEFT_WAYS`, and the plain pipeline's memory."""

    method: str
    concepts: int
    time: Timed
    peak_bytes: int | None
    plain_peak_bytes: int | None


def time_rows(
    methods: Sequence[str], concepts: Sequence[int], plain: Job, rounds: int, *, peaks: bool = True
) -> list[TimedRow]:
    """Times methods with so many concepts in this process, then measures the memory of each in a process of its own.

    In every round the plain pipeline, all methods and PEFT make one image each, one after the other.
    """
    jobs = {n: [replace(plain, method=name, concepts=n) for name in (*methods, *PEFT_WAYS)] for n in concepts}
    all_jobs, times, memory = [job for some in jobs.values() for job in some], [], []
    pipe = open_with_concepts(replace(plain, concepts=max(concepts)))
    with bar("timing", (1 + rounds) * (len(concepts) + len(all_jobs))) as on_progress:
        done = 0

        def count() -> None:
            nonlocal done
            done += 1
            on_progress(done)

        for number, some in jobs.items():
            on_progress(done, f"timing {number} concepts")
            times += time_ways(pipe, some, rounds, count)
    del pipe
    measured = (plain, *all_jobs) if peaks else ()
    with bar("memory", len(measured)) as on_progress:  # a process each, which takes longer than a call
        for i, job in enumerate(measured):
            on_progress(i, f"memory of {job.method or 'plain'} with {job.concepts} concepts")
            memory.append(peak_bytes(job))
    plain_memory, *memory = memory or [None] * (1 + len(all_jobs))
    return [
        TimedRow(job.method or "", job.concepts, time, peak, plain_memory)
        for job, time, peak in zip(all_jobs, times, memory, strict=True)
    ]


def times_table(rows: Sequence[TimedRow], what: str) -> Table:
    """Seconds of whole calls and the peak of the memory, as ratios to the plain pipeline."""
    table = new_table(
        f"Measured: {what}; seconds of whole calls without decoding, of those before the first step, and beside them "
        "to load and remove LoRAs; ratio to the plain pipeline round by round; peak of the memory, model included. "
        "set_adapters and fuse_lora are plain diffusers with PEFT",
        ["method", "N", "s", "before", "beside", "ratio", "min..max", "MiB", "ratio"],
    )
    plain = rows[0].plain_peak_bytes
    table.add_row("plain", "0", *"-----", *_peak(plain, plain))
    for row in rows:
        time = row.time
        table.add_row(
            row.method, str(row.concepts), f"{time.seconds:.2f}", f"{time.preparation_seconds:.2f}",
            f"{time.change_seconds:.2f}", f"{time.ratio:.3f}",
            f"{time.ratio_min:.2f}..{time.ratio_max:.2f}", *_peak(row.peak_bytes, plain),
        )  # fmt: skip
    return table


def _peak(peak: int | None, plain: int | None) -> tuple[str, str]:
    """MiB, and the ratio to the plain pipeline."""
    return ("-", "-") if peak is None or plain is None else (f"{peak / MIB:.0f}", f"{peak / plain:.3f}")


def main() -> None:
    """Measures the memory of the job on the command line."""
    job = Job(**json.loads(sys.argv[1]))
    pipe = open_with_concepts(job if job.method not in PEFT_WAYS else replace(job, concepts=0))
    way = way_of(pipe, job)
    with peak_memory(pipe._execution_device) as memory:
        way()
    sys.stdout.write(json.dumps({"peak_bytes": memory.peak_bytes}) + "\n")


@dataclass(frozen=True)
class Call:
    """Seconds of a call, of these those before the first denoising step, and those beside it (`Timed`)."""

    seconds: float
    preparation_seconds: float
    change_seconds: float = 0.0


def image_size(pipe: Any, side: int | None) -> tuple[int, int]:
    """Width and height of a benchmark's images, in pixels; None is the model's own."""
    return size_of(pipe, _SCENE) if side is None else (side, side)


def size_and_guidance(pipe: Any, job: Job) -> dict[str, Any]:
    """Arguments of a job's calls that families name differently."""
    return {**pipe.sized(*image_size(pipe, job.size)), **pipe.guided(GUIDANCE, None)}


def call(pipe: Any, job: Job, arguments: Mapping[str, Any], output_type: str = "latent") -> Call:
    """One call with these arguments beside the job's, without decoding if its output are latents, and its time."""
    start = time.perf_counter()
    output = pipe(
        prompt=PROMPT, num_inference_steps=job.steps, output_type=output_type,
        generator=torch.Generator().manual_seed(0), **arguments,
    )  # fmt: skip
    output.images.sum().item()  # waits for the device
    seconds = time.perf_counter() - start
    return Call(seconds, output.cost.preparation_seconds if "concepts" in arguments else 0.0)


if __name__ == "__main__":
    main()
