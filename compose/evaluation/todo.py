"""A batch that may have to be done: what is stored of it, and how its results are stored."""

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from lora_compose.compose.evaluation.batches import Batch, batches
from lora_compose.compose.evaluation.planning import make_plan
from lora_compose.compose.evaluation.results import (
    FAILED,
    MADE,
    PLAN,
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
from lora_compose.compose.evaluation.suite import Suite
from lora_compose.compose.evaluation.worker import Images, Result
from lora_compose.compose.files.atomic import write_whole
from lora_compose.compose.files.claims import Claim
from lora_compose.compose.files.images import png_bytes, read_pixels
from lora_compose.compose.files.reading import FileError
from lora_compose.compose.files.stored import write

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kept:
    """What is stored of a batch: whether its images and scores are there, and what is damaged."""

    made: bool
    scored: bool
    damage: tuple[str, ...]

    def report(self) -> None:
        """Logs what is damaged."""
        for damage in self.damage:
            logger.error("%s; it is generated again", damage)


@dataclass(frozen=True)
class Todo:
    """A batch that may have to be done.

    Attributes:
        out: The evaluation's folder.
        batch: The batch.
        planned: Its plan.
        old: Whether it was done when this process began, so that it may have been damaged since.
        failure: When it last failed before this process began; None if it did not.
    """

    out: Path
    batch: Batch
    planned: Planned
    old: bool
    failure: int | None

    def look(self) -> Kept | None:
        """What is stored; None if nothing is left to do: it is complete, or another process has just failed at it."""
        if _last_failure(self.out, self.planned) != self.failure:
            return None
        if not self.old and is_done(self.out, self.planned):
            return None  # another process has just made it
        kept = self._look()
        return None if kept.made and kept.scored else kept

    def images(self) -> list[Image.Image]:
        """The stored images."""
        return [read_pixels(image_path(self.out, self.planned.key, seed)) for seed in self.batch.seeds]

    def keep(self, results: Iterable[Result], claim: Claim) -> None:
        """Stores results as they come. If another process has taken the batch over meanwhile, its results stand.

        Raises:
            OSError: If they cannot be written.
        """
        folder = batch_folder(self.out, self.planned.key)
        for result in results:
            if not claim.held:
                logger.warning(
                    "%s was taken over by another process: this one had given no sign of life", self.planned.key
                )
                return
            if isinstance(result, Images):
                self._keep_images(folder, result)
            elif isinstance(result, Scores):
                write(folder / self.planned.scores, result)
                (folder / FAILED).unlink(missing_ok=True)
            else:
                self._keep_failure(folder, result)

    def _look(self) -> Kept:
        made, scores, damage = None, None, []
        try:
            made = read_made(self.out, self.planned)
            if made is not None:
                check_images(self.out, self.planned, made)
        except FileError as error:
            made = None
            damage.append(str(error))
        try:
            scores = read_scores(self.out, self.planned, self.batch.scene.concepts)
        except FileError as error:
            damage.append(str(error))
        return Kept(made is not None, scores is not None, tuple(damage))

    def _keep_images(self, folder: Path, images: Images) -> None:
        clear(self.out, self.planned.key)
        sha256 = {}
        for one in images.made:
            seed, data = one.record.run.seed, png_bytes(one.image, one.record)
            write_whole(image_path(self.out, self.planned.key, seed), data)
            sha256[seed] = hashlib.sha256(data).hexdigest()
        about = Made(
            scene=self.planned.scene, arm=self.planned.arm, alone=self.planned.alone, seeds=self.planned.seeds,
            cost=images.cost, versions=images.versions, machine=images.machine, sha256=sha256,
        )  # fmt: skip
        write(folder / MADE, about)

    def _keep_failure(self, folder: Path, failed: Failed) -> None:
        logger.error("%s failed: %s", self.planned.key, failed.error)
        if self._look().made:
            (folder / self.planned.scores).unlink(missing_ok=True)
        else:
            clear(self.out, self.planned.key)  # otherwise damaged images would count as made
        write(folder / FAILED, failed)


def open_plan(suite: Suite, out: Path) -> dict[str, Todo]:
    """Writes the plan of a suite; returns its batches by key.

    Raises:
        ValueError: If files are missing.
        OSError: If it cannot be written.
    """
    plan = make_plan(suite)
    write(out / PLAN, plan)
    return {
        planned.key: Todo(out, batch, planned, is_done(out, planned), _last_failure(out, planned))
        for batch, planned in zip(batches(suite), plan.batches, strict=True)
    }


def _last_failure(out: Path, planned: Planned) -> int | None:
    try:
        return (batch_folder(out, planned.key) / FAILED).stat().st_mtime_ns
    except FileNotFoundError:
        return None
