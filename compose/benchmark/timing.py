"""Seconds and memory of real calls, next to the plain pipeline's.

`python -m lora_compose.compose.benchmark.timing JOB` measures the memory of one call in a process of its own: JOB is a
JSON object with the fields of `Job`, and the answer on stdout is one as well.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lora_compose.compose.benchmark.architectures import PROMPT, attention_lora, columns
from lora_compose.compose.benchmark.memory import peak_memory
from lora_compose.compose.generate.making import size_of
from lora_compose.compose.generate.models import open_model
from lora_compose.compose.support.savers import Saver
from lora_compose.pipelines.methods import Settings, make_method
from lora_compose.pipelines.scene import Run, Scene

_SCENE = Scene(prompt=PROMPT)


@dataclass(frozen=True)
class Job:
    """One call that is measured.

    Attributes:
        model: A folder, a checkpoint file, a hub repository or `playground`.
        device: The device.
        steps: Denoising steps.
        method: Name of the method; None is the plain pipeline.
        concepts: Number of concepts.
        settings: Those of the method that differ from its defaults.
        savers: Options that save memory.
    """

    model: str
    device: str
    steps: int
    method: str | None = None
    concepts: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    savers: Sequence[Saver] = ()


@dataclass(frozen=True)
class Timed:
    """Seconds of whole calls without decoding: medians over all pairs, ratios pair by pair.

    Attributes:
        plain_seconds: A call of the plain pipeline.
        seconds: A call of the method.
        preparation_seconds: Of these, before the first denoising step.
        ratio: Method to plain, the median.
        ratio_min: The smallest ratio.
        ratio_max: The largest ratio.
    """

    plain_seconds: float
    seconds: float
    preparation_seconds: float
    ratio: float
    ratio_min: float
    ratio_max: float


def open_with_concepts(job: Job) -> Any:
    """Opens the model of a job and loads its concepts with random LoRAs into it, "concept 0" and so on."""
    pipe = open_model(Run(scene=_SCENE, model=job.model, device=job.device), [Saver(name) for name in job.savers])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.safetensors"
        sides = {"lora_A": "down", "lora_B": "up"}
        lora = attention_lora(pipe.unet).items()
        save_file({f"unet.{n}.{key}.weight": getattr(f, side) for n, f in lora for key, side in sides.items()}, path)
        for concept in columns(job.concepts, *size_of(pipe, _SCENE)):
            pipe.load_concept(path, name=concept.name, trigger=concept.trigger, class_word=concept.class_word)
    return pipe


def time_pairs(pipe: Any, settings: Settings, concepts: int, steps: int, pairs: int) -> Timed:
    """Times plain, method, plain, method, ... after a call of each to warm up."""
    ours = arguments_of(pipe, settings, concepts)
    for warm_up in ({}, ours):
        call(pipe, steps, warm_up)
    timed = [(call(pipe, steps, {}), call(pipe, steps, ours)) for _ in range(pairs)]
    ratios = [method.seconds / plain.seconds for plain, method in timed]
    return Timed(
        statistics.median(plain.seconds for plain, _ in timed),
        statistics.median(method.seconds for _, method in timed),
        statistics.median(method.preparation_seconds for _, method in timed),
        statistics.median(ratios),
        min(ratios),
        max(ratios),
    )


def peak_bytes(job: Job) -> int:
    """Peak memory of one call, model and LoRAs included, in a process of its own.

    Raises:
        ChildProcessError: If that process fails; the message has its error output.
    """
    command = [sys.executable, "-m", "lora_compose.compose.benchmark.timing", json.dumps(asdict(job))]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode != 0:
        raise ChildProcessError(f"the memory of {job} could not be measured:\n{ran.stderr.strip()[-2000:]}")
    return json.loads(ran.stdout.splitlines()[-1])["peak_bytes"]


def main() -> None:
    """Measures the memory of the job on the command line."""
    job = Job(**json.loads(sys.argv[1]))
    pipe = open_with_concepts(job)
    arguments = {} if job.method is None else arguments_of(pipe, make_method(job.method, job.settings), job.concepts)
    with peak_memory(pipe._execution_device) as memory:
        call(pipe, job.steps, arguments)
    sys.stdout.write(json.dumps({"peak_bytes": memory.peak_bytes}) + "\n")


@dataclass(frozen=True)
class Call:
    """Seconds of a call, and its seconds before the first denoising step."""

    seconds: float
    preparation_seconds: float


def arguments_of(pipe: Any, settings: Settings, concepts: int) -> dict[str, Any]:
    """The arguments of a call that a method adds to a plain one."""
    return {"concepts": columns(concepts, *size_of(pipe, _SCENE)), "method": settings}


def call(pipe: Any, steps: int, arguments: Mapping[str, Any]) -> Call:
    """One call without decoding, and its time."""
    width, height = size_of(pipe, _SCENE)
    start = time.perf_counter()
    output = pipe(
        PROMPT, height=height, width=width, num_inference_steps=steps, guidance_scale=5.0, output_type="latent",
        generator=torch.Generator().manual_seed(0), **arguments,
    )  # fmt: skip
    output.images.sum().item()  # waits for the device
    seconds = time.perf_counter() - start
    return Call(seconds, output.cost.preparation_seconds if arguments else 0.0)


if __name__ == "__main__":
    main()
