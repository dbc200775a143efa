"""The batches of an evaluation, under names that change with all that their results depend on, and what is stored."""

import hashlib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from lora_compose.compose.cluster.packing import named_as
from lora_compose.compose.evaluation.batches import Batch, batches, run_of
from lora_compose.compose.evaluation.encoders import JUDGES
from lora_compose.compose.evaluation.results import (
    FAILED,
    MADE,
    PLAN,
    BatchPlan,
    Failed,
    Made,
    Planned,
    Scores,
    batch_folder,
    check_images,
    clear,
    image_path,
    is_done,
    read_made,
    read_scores,
)
from lora_compose.compose.evaluation.scoring import recorded_box, reference_files
from lora_compose.compose.evaluation.suite import Suite, SuiteConcept, ZeroShotConfig
from lora_compose.compose.evaluation.worker import Images
from lora_compose.compose.files.atomic import write_whole
from lora_compose.compose.files.images import png_bytes, read_pixels
from lora_compose.compose.files.reading import FileError
from lora_compose.compose.files.stored import changed, write
from lora_compose.compose.generate.facts import digest, file_hash, model_facts, run_facts
from lora_compose.compose.playground.assets import PLAYGROUNDS, playground_judge, playground_model
from lora_compose.compose.support.frozen import shared
from lora_compose.pipelines.support.home import expanded

logger = logging.getLogger(__name__)

SCORING = 3  # incremented whenever the computation of scores changes
ZERO_SHOT = 2  # incremented whenever what zero-shot detectors find changes
_SHIPPED = tuple(f"{name}:" for name in PLAYGROUNDS)


def plan_batches(suite: Suite) -> BatchPlan:
    """All batches of a suite.

    Images are kept under a hash of the run, the threads and the contents of model and LoRAs; scores under a hash of the
    scene and the contents of encoder, detector and references. So a rerun continues where it stopped, a changed suite
    keeps what is still valid, and outdated results are never used. Raises ValueError if files are missing.
    """
    model, scoring = fingerprint(suite.model), _scoring(suite)
    planned = []
    for batch in batches(suite):
        scene, arm = batch.scene, batch.arm
        made_key = digest(run_facts(run_of(suite, batch), batch.seeds, suite.threads, suite.save_memory), model)
        names = [scene.name, arm.name, *([arm.alone] if arm.alone else []), str(batch.seeds[0])]
        unread = {"bundle"} if scene.bystanders else {"bundle", "bystanders"}  # as in facts of versions without them
        scored_key = digest(scene.model_dump(mode="json", exclude=unread), scoring)
        planned.append(
            Planned(
                key=f"{'-'.join(map(_slug, names))}-{made_key}", scores=f"scores-{scored_key}.json", scene=scene.name,
                arm=arm.name, alone=arm.alone, seeds=batch.seeds,
            )
        )  # fmt: skip
    return BatchPlan(suite=suite, batches=tuple(planned))


def _scoring(suite: Suite) -> Any:
    concepts = [_concept_facts(concept) for concept in suite.concepts]
    chosen = [
        [metric.name, fingerprint(metric.model), *([] if metric.faces is None else [fingerprint(metric.faces)])]
        for metric in suite.metrics
    ]
    return [SCORING, fingerprint(suite.encoder), detector_facts(suite), concepts, chosen]


def detector_facts(suite: Suite) -> Any:
    """Identifies a detector: by its settings, and by the contents of its model, wherever that is."""
    if suite.detector is None:
        return None
    settings = suite.detector.model_dump(mode="json", exclude={"model"})
    if isinstance(suite.detector, ZeroShotConfig):
        return [ZERO_SHOT, settings, fingerprint(suite.detector.model)]
    return settings


def _concept_facts(concept: SuiteConcept) -> list[Any]:
    facts = [concept.name, concept.trigger, concept.class_word, _references(concept)]
    return [*facts, concept.role] if concept.is_style else facts  # subjects as in facts of versions without roles


def _references(concept: SuiteConcept) -> list[Any]:
    """The contents of reference images, each with the box that cuts it, if there is one."""
    paths = reference_files(concept)
    if missing := [path for path in paths if not path.is_file()]:
        raise ValueError(f"concept {concept.name!r}: the reference image {str(missing[0])!r} is missing")
    hashes = [file_hash(str(path)) for path in paths]
    if isinstance(concept.references, str) and concept.references.startswith(_SHIPPED):
        return hashes  # their boxes never change, and scores that were stored before boxes counted stay valid
    boxes = map(recorded_box, paths)
    return [content if box is None else [content, box] for content, box in zip(hashes, boxes, strict=True)]


def fingerprint(source: str) -> Any:
    """Identifies a model: by hashes of its files, or by its name if it is a hub repository."""
    path = expanded(source)
    if source in PLAYGROUNDS:
        path = playground_model(source)
    elif source in JUDGES:
        path = playground_judge()
    return model_facts(path, source)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "_"


@dataclass(frozen=True)
class Kept:
    """The stored part of a batch: whether its images and scores are there, and what is damaged."""

    made: bool
    scored: bool
    damage: tuple[str, ...]


@dataclass(frozen=True)
class Todo:
    """A batch that may have to be done.

    `old` is whether it was done when this process began, so that it may have been damaged since; `failure` is when it
    last failed before, None if it did not.
    """

    suite: Suite
    out: Path
    batch: Batch
    planned: Planned
    old: bool
    failure: int | None

    def is_left(self) -> bool:
        """Whether something of it is missing or damaged; logs what is damaged."""
        kept = self._left()
        for damage in () if kept is None else kept.damage:
            logger.error("%s; it is generated again", damage)
        return kept is not None

    def arguments(self) -> tuple[Batch, Sequence[Image.Image]] | None:
        """The batch, with its images if they are there; None if nothing is left to do."""
        kept = self._left()
        if kept is None:
            return None
        seeds = self.batch.seeds if kept.made else ()
        return self.batch, [read_pixels(image_path(self.out, self.planned.key, seed)) for seed in seeds]

    def keep(self, result: Images | Scores) -> None:
        """Stores images or scores, paths in records as on this machine. Raises OSError if they cannot be written."""
        if isinstance(result, Images):
            self._keep_images(result)
        else:
            write(self._folder / self.planned.scores, result)
            (self._folder / FAILED).unlink(missing_ok=True)

    def keep_failure(self, error: str) -> None:
        """Stores why the batch could not be made or scored, and logs it."""
        logger.error("%s failed: %s", self.planned.key, error)
        if self._look().made:
            (self._folder / self.planned.scores).unlink(missing_ok=True)
        else:
            clear(self.out, self.planned.key)  # otherwise damaged images would count as made
        names = Failed.model_fields.keys() - {"error"}
        write(self._folder / FAILED, Failed(**shared(names, self.planned), error=error))

    @property
    def _folder(self) -> Path:
        return batch_folder(self.out, self.planned.key)

    def _left(self) -> Kept | None:
        """The stored part; None if nothing is left to do: it is complete, or another process has just failed at it."""
        if changed(self._folder / FAILED) != self.failure:
            return None
        if not self.old and is_done(self.out, self.planned):
            return None  # another process has just made it
        kept = self._look()
        return None if kept.made and kept.scored else kept

    def _look(self) -> Kept:
        record, scores, damage = None, None, []
        try:
            record = read_made(self.out, self.planned)
            if record is not None:
                check_images(self.out, self.planned, record)
        except FileError as error:
            record = None
            damage.append(str(error))
        try:
            scores = read_scores(self.out, self.planned, self.batch.scene.concepts)
        except FileError as error:
            damage.append(str(error))
        return Kept(record is not None, scores is not None, tuple(damage))

    def _keep_images(self, images: Images) -> None:
        clear(self.out, self.planned.key)
        run, sha256 = run_of(self.suite, self.batch), {}
        for made in images.made:
            image = named_as(made, run)
            seed, data = image.record.run.seed, png_bytes(image.image, image.record)
            write_whole(image_path(self.out, self.planned.key, seed), data)
            sha256[seed] = hashlib.sha256(data).hexdigest()
        write(self._folder / MADE, Made(**shared(Made.model_fields, images, self.planned, sha256=sha256)))


def open_plan(suite: Suite, out: Path) -> dict[str, Todo]:
    """Writes the plan of a suite; returns its batches by key.

    Raises ValueError if files are missing, and OSError if it cannot be written.
    """
    plan = plan_batches(suite)
    write(out / PLAN, plan)
    return {
        planned.key: Todo(
            suite, out, batch, planned, is_done(out, planned), changed(batch_folder(out, planned.key) / FAILED)
        )
        for batch, planned in zip(batches(suite), plan.batches, strict=True)
    }
