"""Generates and scores the images of batches with an opened model. Nothing is stored here."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image

from lora_compose.compose.benchmark.counting import Counted, count_run
from lora_compose.compose.benchmark.memory import peak_memory
from lora_compose.compose.benchmark.running import count_by_running, needs_running
from lora_compose.compose.evaluation.batches import Batch, batches, run_of
from lora_compose.compose.evaluation.results import ImageCost, Scores
from lora_compose.compose.evaluation.scoring import Scorer, open_scorer
from lora_compose.compose.evaluation.suite import Suite
from lora_compose.compose.files.images import Machine
from lora_compose.compose.generate.machine import machine, versions
from lora_compose.compose.generate.making import Made, load, make_batch, plan, size_of, steps_of
from lora_compose.compose.generate.models import open_model
from lora_compose.compose.generate.schedulers import scheduler_of
from lora_compose.pipelines.scene.scene import Run

PROBE_STEPS = 2


@dataclass(frozen=True)
class Images:
    """The images of a batch with their records, in the order of the seeds, what one cost, and what made them."""

    made: tuple[Made, ...]
    cost: ImageCost
    versions: Mapping[str, str]
    machine: Machine


@dataclass
class Worker:
    """Makes and scores batches of a suite with an opened model, one after the other."""

    suite: Suite
    pipe: Any
    scorer: Scorer
    _counted: dict[Any, Counted] = field(default_factory=dict)
    _peaks: dict[Any, int] = field(default_factory=dict)

    @classmethod
    def open(cls, suite: Suite, device: str) -> "Worker":
        """Opens encoders, detector and references, and then the model.

        Raises:
            ValueError: If one of them cannot be opened.
        """
        if suite.threads is not None:
            torch.set_num_threads(suite.threads)
        scorer = open_scorer(suite, device)
        run = run_of(suite, next(batches(suite)))
        pipe = open_model(run.model_copy(update={"device": device}), suite.save_memory)
        return cls(suite, pipe, scorer)

    @property
    def device(self) -> torch.device:
        """The device that the model runs on, even if it is offloaded."""
        return self.pipe._execution_device

    def check(self, batch: Batch) -> tuple[()]:
        """Plans a batch, without a result; raises ValueError if it cannot work."""
        plan(self.pipe, self._run(batch))
        return ()

    def do(
        self, batch: Batch, images: Sequence[Image.Image] = (), on_progress: Any = None
    ) -> Iterator[Images | Scores]:
        """Makes and scores the images of a batch, or only scores those that are given.

        `on_progress` gets the finished fraction after every step.
        """
        if not images:
            result = self._make(batch, on_progress)
            yield result
            images = [made.image for made in result.made]
        scored = [self.scorer.score(image.convert("RGB"), batch.scene) for image in images]
        yield Scores(images=dict(zip(batch.seeds, scored, strict=True)), truth=self.scorer.truth(batch.scene))

    def _run(self, batch: Batch) -> Run:
        """The run of a batch, with files and the device of this machine."""
        here = replace(batch, scene=self.suite.scene(batch.scene.name))
        return run_of(self.suite, here).model_copy(update={"device": str(self.device)})

    def _make(self, batch: Batch, on_progress: Any) -> Images:
        run, device, number = self._run(batch), self.device, len(batch.seeds)
        counted = self.count(batch)
        peak = self._probed_peak(batch, run) if device.type == "cpu" else None
        start = time.perf_counter()
        with peak_memory(device) if device.type == "cuda" else nullcontext() as memory:
            result = make_batch(self.pipe, run, batch.seeds, on_progress)
        rows = ("rows_forward", "rows_stopped", "rows_backward")
        cost = ImageCost(
            **{name: getattr(result.cost, name) / number if result.cost else getattr(counted, name) for name in rows},
            flops=counted.flops,
            seconds=(time.perf_counter() - start) / number,
            preparation_seconds=result.cost.preparation_seconds / number if result.cost else 0.0,
            peak_bytes=peak if memory is None else memory.peak_bytes,
        )
        return Images(result.images, cost, versions(), machine(device))

    def _probed_peak(self, batch: Batch, run: Run) -> int:
        """Measures memory in a short run of its own, once for each kind of call, since it is slow on a CPU."""
        scene = run.scene
        kind = batch.arm.name, run.method, _loras(run), len(batch.seeds), scene.width, scene.height
        if kind not in self._peaks:
            # From a start image, the first ones of so many steps are left out.
            shorter = (run.model_copy(update={"steps": steps}) for steps in range(PROBE_STEPS, run.steps))
            short = next((it for it in shorter if steps_of(self.pipe, it) >= PROBE_STEPS), run)
            with peak_memory("cpu") as memory:
                make_batch(self.pipe, short, batch.seeds)
            self._peaks[kind] = memory.peak_bytes
        return self._peaks[kind]

    def count(self, batch: Batch) -> Counted:
        """The cost of an image of a batch, counted once for each kind of call."""
        run = self._run(batch)
        width, height = size_of(self.pipe, run.scene)
        steps = steps_of(self.pipe, run)
        kind = batch.arm.name, run.method, _loras(run), width, height, steps
        if kind not in self._counted and needs_running(self.pipe):
            self._counted[kind] = count_by_running(self.pipe, run)
        elif kind not in self._counted:
            loaded = [load(self.pipe, concept) for concept in run.scene.concepts]
            planned = plan(self.pipe, run)
            method = None if planned is None else planned.choice.method
            scheduler = scheduler_of(self.pipe, run)
            self._counted[kind] = count_run(
                self.pipe, method, loaded, steps, run.guidance_scale, width, height, scheduler=scheduler
            )
        return self._counted[kind]


def _loras(run: Run) -> Sequence[bool]:
    """Whether each concept of a run has a LoRA."""
    return tuple(not concept.is_bystander for concept in run.scene.concepts)
