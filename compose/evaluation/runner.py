"""Generates and scores the batches of a plan; resumes after an interruption and keeps finished results.

Any number of processes, on any machines that share the folder, can work on it: each claims one batch at a time. They
may start late, or end at any time.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lora_compose.compose.benchmark.counting import Counted, count_run
from lora_compose.compose.benchmark.memory import peak_memory
from lora_compose.compose.benchmark.running import count_by_running, needs_running
from lora_compose.compose.evaluation.batches import Batch, batches, run_of
from lora_compose.compose.evaluation.detectors import make_detector
from lora_compose.compose.evaluation.encoders import load_encoder
from lora_compose.compose.evaluation.planning import make_plan
from lora_compose.compose.evaluation.results import (
    FAILED,
    MADE,
    PLAN,
    Failed,
    ImageCost,
    Made,
    Planned,
    Scores,
    batch_folder,
    check_images,
    clear,
    image_path,
    read_made,
    read_scores,
)
from lora_compose.compose.evaluation.scoring import Scorer, reference_crops
from lora_compose.compose.evaluation.suite import Suite
from lora_compose.compose.files.atomic import write_whole
from lora_compose.compose.files.claims import Claim, Claims
from lora_compose.compose.files.images import png_bytes, read_pixels
from lora_compose.compose.files.reading import FileError
from lora_compose.compose.files.stored import write
from lora_compose.compose.generate.machine import machine, versions
from lora_compose.compose.generate.making import MadeBatch, load, make_batch, rehearse, resolve_choice, size_of
from lora_compose.compose.generate.models import open_model
from lora_compose.compose.generate.processes import own_device
from lora_compose.compose.generate.schedulers import scheduler_class
from lora_compose.pipelines.scene import Run

logger = logging.getLogger(__name__)

CLAIMS = "claims"
PATIENCE = 60.0
"""Seconds without a heartbeat after which a process of an evaluation counts as dead."""

PROBE_STEPS = 2

OnProgress = Callable[[float], None]


def evaluate(suite: Suite, out: Path, on_progress: OnProgress | None = None, *, patience: float = PATIENCE) -> None:
    """Generates and scores the remaining batches of a suite, until this or other processes have finished all.

    Finished batches are not repeated unless they are damaged. A batch that fails is tried once.

    Args:
        suite: What to evaluate.
        out: The evaluation's folder.
        on_progress: Called with the number of finished batches of all processes.
        patience: Seconds without a heartbeat after which the batch of another process is taken over.

    Raises:
        ValueError: If something in the suite cannot work; nothing has been made then.
        OSError: If results cannot be written; those so far are kept.
    """
    report = on_progress or (lambda done: None)
    plan = make_plan(suite)
    write(out / PLAN, plan)
    left = {
        planned.key: _Todo(batch, planned, is_done(out, planned), _last_failure(out, planned))
        for batch, planned in zip(batches(suite), plan.batches, strict=True)
    }
    worker, done = None, 0

    def do(key: str, claim: Claim) -> None:
        nonlocal worker, done
        todo = left[key]
        if not todo.is_settled(out):
            worker = worker or _open_checked(suite, out, left.values())
            worker.do(todo.batch, todo.planned, claim, lambda share: report(done + share))
        del left[key]
        done += 1
        report(done)

    report(done)
    Claims(out / CLAIMS, patience).work(list(left), do)


@dataclass(frozen=True)
class _Todo:
    """A batch that may have to be done.

    Attributes:
        batch: The batch.
        planned: Its plan.
        old: Whether it was done when this process began, so that it may have been damaged since.
        failure: When it last failed before this process began; None if it did not.
    """

    batch: Batch
    planned: Planned
    old: bool
    failure: int | None

    def is_settled(self, out: Path) -> bool:
        """Whether nothing is left to do: it is complete, or another process has just failed at it."""
        if _last_failure(out, self.planned) != self.failure:
            return True
        if not self.old and is_done(out, self.planned):
            return True  # another process has just made it
        kept = _look(out, self.batch, self.planned)
        for damage in kept.damage:
            logger.error("%s; it is generated again", damage)
        return kept.made and kept.scored


def _last_failure(out: Path, planned: Planned) -> int | None:
    try:
        return (batch_folder(out, planned.key) / FAILED).stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _open_checked(suite: Suite, out: Path, left: Iterable[_Todo]) -> "Worker":
    """Opens a worker, and checks all batches that are left.

    Raises:
        ValueError: If something cannot be opened, or something in the suite cannot work.
    """
    if suite.threads is not None:
        torch.set_num_threads(suite.threads)
    worker = open_worker(suite, out, own_device(suite.device))
    worker.check([todo.batch for todo in left if not is_done(out, todo.planned)])
    return worker


@dataclass(frozen=True)
class _Kept:
    """The state of a stored batch: whether it is made and scored, and what is damaged."""

    made: bool
    scored: bool
    damage: tuple[str, ...]


def _look(out: Path, batch: Batch, planned: Planned) -> _Kept:
    made, scores, damage = None, None, []
    try:
        made = read_made(out, planned)
        if made is not None:
            check_images(out, planned, made)
    except FileError as error:
        made = None
        damage.append(str(error))
    try:
        scores = read_scores(out, planned, batch.scene.concepts)
    except FileError as error:
        damage.append(str(error))
    return _Kept(made is not None, scores is not None, tuple(damage))


def is_done(out: Path, planned: Planned) -> bool:
    """Whether a batch has been made and scored, judged by which files there are."""
    folder = batch_folder(out, planned.key)
    return (folder / MADE).is_file() and (folder / planned.scores).is_file()


def open_worker(suite: Suite, out: Path, device: str) -> "Worker":
    """Opens model, encoder, detector and references.

    Raises:
        ValueError: If one of them cannot be opened.
    """
    encoder = load_encoder(suite.encoder, device)
    detector = None if suite.detector is None else make_detector(suite.detector, encoder, device)
    references = {concept.name: encoder.images(reference_crops(concept)) for concept in suite.concepts}
    run = run_of(suite, next(batches(suite)))
    pipe = open_model(run.model_copy(update={"device": device}), suite.save_memory)
    return Worker(suite, out, pipe, Scorer(suite, encoder, detector, references))


@dataclass
class Worker:
    """Makes and scores batches, one after the other.

    Attributes:
        suite: What is evaluated.
        out: The evaluation's folder.
        pipe: The model.
        scorer: Scores images.
    """

    suite: Suite
    out: Path
    pipe: Any
    scorer: Scorer
    _counted: dict[Any, Counted] = field(default_factory=dict)
    _peaks: dict[Any, int] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """The device that the model runs on, even if it is offloaded."""
        return self.pipe._execution_device

    def check(self, todo: Iterable[Batch]) -> None:
        """Rehearses all batches up to the first denoising step.

        Raises:
            ValueError: With all problems, each with its scene and arm.
        """
        problems = []
        for batch in {(batch.scene.name, batch.arm.name, batch.arm.alone): batch for batch in todo}.values():
            try:
                rehearse(self.pipe, self._run(batch))
            except ValueError as error:
                problems.append(f"scene {batch.scene.name!r}, {batch.arm.name}: {error}")
        if problems:
            raise ValueError("\n".join(["the suite cannot be evaluated:", *problems]))

    def do(self, batch: Batch, planned: Planned, claim: Claim, on_progress: OnProgress) -> None:
        """Generates and scores one batch. An error is stored and does not stop other batches.

        If another process has taken the batch over meanwhile, its results stand.

        Raises:
            OSError: If results cannot be written.
        """
        folder = batch_folder(self.out, planned.key)
        images: Sequence[Image.Image] = ()
        if not _look(self.out, batch, planned).made:
            try:
                made, cost = self._make(batch, on_progress)
            except Exception as error:  # models and libraries may raise anything
                clear(self.out, planned.key)  # otherwise damaged images would count as made
                _write_down(folder, planned, error)
                return
            if not claim.held:
                logger.warning("%s was taken over by another process: this one had given no sign of life", planned.key)
                return
            self._keep(planned, made, cost)
            images = [image.image for image in made.images]
        try:
            scores = self._score(batch, planned, images)
        except Exception as error:
            (folder / planned.scores).unlink(missing_ok=True)
            _write_down(folder, planned, error)
            return
        write(folder / planned.scores, scores)
        (folder / FAILED).unlink(missing_ok=True)

    def _score(self, batch: Batch, planned: Planned, images: Sequence[Image.Image]) -> Scores:
        """Scores the images that were just made, or those on disk."""
        images = images or [read_pixels(image_path(self.out, planned.key, seed)) for seed in batch.seeds]
        scored = [self.scorer.score(image.convert("RGB"), batch.scene) for image in images]
        return Scores(images=dict(zip(batch.seeds, scored, strict=True)))

    def _run(self, batch: Batch) -> Run:
        return run_of(self.suite, batch).model_copy(update={"device": str(self.device)})

    def _make(self, batch: Batch, on_progress: OnProgress) -> tuple[MadeBatch, ImageCost]:
        run, device, number = self._run(batch), self.device, len(batch.seeds)
        counted = self._count(batch)
        peak = self._probed_peak(batch, run) if device.type == "cpu" else None
        start = time.perf_counter()
        if device.type == "cuda":
            with peak_memory(device) as memory:
                made = make_batch(self.pipe, run, batch.seeds, on_progress)
            peak = memory.peak_bytes
        else:
            made = make_batch(self.pipe, run, batch.seeds, on_progress)
        return made, ImageCost(
            rows_forward=made.cost.rows_forward / number if made.cost else counted.rows_forward,
            rows_stopped=made.cost.rows_stopped / number if made.cost else counted.rows_stopped,
            rows_backward=made.cost.rows_backward / number if made.cost else counted.rows_backward,
            flops=counted.flops,
            seconds=(time.perf_counter() - start) / number,
            preparation_seconds=made.cost.preparation_seconds / number if made.cost else 0.0,
            peak_bytes=peak,
        )

    def _probed_peak(self, batch: Batch, run: Run) -> int:
        """Measures memory in a short run of its own, once for each kind of call, since it is slow on a CPU."""
        scene = run.scene
        kind = batch.arm.name, run.method, len(scene.concepts), len(batch.seeds), scene.width, scene.height
        if kind not in self._peaks:
            with peak_memory("cpu") as memory:
                make_batch(self.pipe, run.model_copy(update={"steps": min(run.steps, PROBE_STEPS)}), batch.seeds)
            self._peaks[kind] = memory.peak_bytes
        return self._peaks[kind]

    def _count(self, batch: Batch) -> Counted:
        run = self._run(batch)
        width, height = size_of(self.pipe, run.scene)
        kind = batch.arm.name, run.method, len(run.scene.concepts), width, height
        if kind not in self._counted and needs_running(self.pipe):
            self._counted[kind] = count_by_running(self.pipe, run)
        elif kind not in self._counted:
            loaded = [load(self.pipe, concept) for concept in run.scene.concepts]
            choice = resolve_choice(self.pipe, run, loaded)
            method = choice and choice.method
            scheduler = self.pipe.scheduler
            if run.scheduler is not None:
                scheduler = scheduler_class(run.scheduler).from_config(scheduler.config)
            self._counted[kind] = count_run(
                self.pipe, method, loaded, run.steps, run.guidance_scale, width, height, scheduler=scheduler
            )
        return self._counted[kind]

    def _keep(self, planned: Planned, made: MadeBatch, cost: ImageCost) -> None:
        clear(self.out, planned.key)
        sha256 = {}
        for image in made.images:
            seed, data = image.record.run.seed, png_bytes(image.image, image.record)
            write_whole(image_path(self.out, planned.key, seed), data)
            sha256[seed] = hashlib.sha256(data).hexdigest()
        about = Made(
            scene=planned.scene, arm=planned.arm, alone=planned.alone, seeds=planned.seeds, cost=cost,
            versions=versions(), machine=machine(self.device), sha256=sha256,
        )  # fmt: skip
        write(batch_folder(self.out, planned.key) / MADE, about)


def _write_down(folder: Path, planned: Planned, error: Exception) -> None:
    message = "\n".join([f"{type(error).__name__}: {str(error).strip()[:1000]}", *getattr(error, "__notes__", ())])
    logger.error("%s failed: %s", planned.key, message, exc_info=logger.isEnabledFor(logging.DEBUG))
    about = {"scene": planned.scene, "arm": planned.arm, "alone": planned.alone, "seeds": planned.seeds}
    write(folder / FAILED, Failed(**about, error=message))
