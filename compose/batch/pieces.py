"""The pieces of a batch that processes share: checks of scenes, and the images of calls."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from lora_compose.compose.batch.jobs import Job
from lora_compose.compose.batch.results import Checked, ChosenMethod, Failed, Folder, MadeRecord
from lora_compose.compose.cluster.packing import named_as
from lora_compose.compose.files.atomic import write_whole
from lora_compose.compose.files.images import png_bytes
from lora_compose.compose.files.stored import changed, write
from lora_compose.compose.generate.making import Made

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Check:
    """The check of a scene; `before` is when it was last checked, None if it was not."""

    folder: Folder
    job: Job
    before: int | None

    def arguments(self) -> tuple[Job] | None:
        """A job of the scene; None if another process has just checked it."""
        return (self.job,) if changed(self.folder.checked_file(self.job)) == self.before else None

    def keep(self, result: ChosenMethod) -> None:
        """Stores the method that is chosen for the scene."""
        method, reason = result
        write(self.folder.checked_file(self.job), Checked(key=self.job.scene_key, method=method, reason=reason))

    def keep_failure(self, error: str) -> None:
        """Stores why the scene cannot be made, and logs it."""
        logger.error("%s: %s", self.job.entry.source, error)
        write(self.folder.checked_file(self.job), Checked(key=self.job.scene_key, error=error))


@dataclass(frozen=True)
class Images:
    """The images of a job; `before` is when it last failed, None if it did not."""

    folder: Folder
    job: Job
    before: int | None

    def arguments(self) -> tuple[Job] | None:
        """The job; None if its scene is invalid, its images are there, or another process has just failed at it."""
        checked = self.folder.checked(self.job)
        if checked is None or checked.error is not None or changed(self.folder.failed_file(self.job)) != self.before:
            return None
        return None if self.folder.has(self.job) else (self.job,)

    def keep(self, result: Sequence[Made]) -> None:
        """Stores the images, whose records name files as on this machine.

        Their checksums come first, so that images of a killed process are recognised.
        """
        named = (named_as(made, self.job.run) for made in result)
        images = {made.record.run.seed: png_bytes(made.image, made.record) for made in named}
        sha256 = {seed: hashlib.sha256(data).hexdigest() for seed, data in images.items()}
        write(self.folder.made_file(self.job), MadeRecord(key=self.job.key, sha256=sha256))
        for seed, data in images.items():
            write_whole(self.folder.image(self.job, seed), data)
        self.folder.failed_file(self.job).unlink(missing_ok=True)

    def keep_failure(self, error: str) -> None:
        """Stores why the job failed, and logs it."""
        logger.error("%s: %s", self.job.entry.source, error)
        write(self.folder.failed_file(self.job), Failed(key=self.job.key, error=error))
