"""The files of a batch: its images, and for each of them a record of what was made, with a checksum.

NAME-SEED.png                  the images, each with its run inside
images.jsonl                   all of them, with seed, path, error, method and the reason for it
state/checked/NAME.json        the check of a scene with the model: its method, or its error
state/made/NAME-SEED.json      how the images of one call were made; written before them, with their checksums
state/failed/NAME-SEED.json    the error of a call
state/plan.json                the scenes with absolute paths, as a batch file
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lora_compose.compose.batch.jobs import Job
from lora_compose.compose.files.reading import FileError
from lora_compose.compose.files.stored import holds, read, write_text
from lora_compose.compose.support.frozen import Frozen

STATE = "state"
CLAIMS = "claims"

ChosenMethod = tuple[str | None, str | None]
"""The method of a call, and the reason for the choice."""

NO_CHOICE: ChosenMethod = (None, None)
"""The choice of a call without concepts."""


_Stored = TypeVar("_Stored", bound=Frozen)


class Checked(Frozen):
    """The check of a scene with the model: its error, or its method and why it is this one (None without concepts)."""

    key: str
    error: str | None = None
    method: str | None = None
    reason: str | None = None


class MadeRecord(Frozen):
    """The images of a call: a hash of everything that they depend on, and the SHA-256 of each file."""

    key: str
    sha256: Mapping[int, str]


class Failed(Frozen):
    """Images that could not be made, with a hash of everything that they depend on."""

    key: str
    error: str


@dataclass(frozen=True)
class Result:
    """An image of a batch: its file or why it was not made, and its method (None without concepts) with the reason."""

    name: str
    seed: int | None
    source: str
    path: Path | None
    error: str | None
    method: str | None = None
    reason: str | None = None


class Folder:
    """The folder of a batch, which need not exist."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def plan(self) -> Path:
        """The scenes, as a batch file."""
        return self.path / STATE / "plan.json"

    @property
    def claims(self) -> Path:
        """The folder in which its processes claim work."""
        return self.path / STATE / CLAIMS

    def image(self, job: Job, seed: int) -> Path:
        """Path of an image."""
        return self.path / f"{job.entry.name}-{seed}.png"

    def checked_file(self, job: Job) -> Path:
        """Path of the check of a scene."""
        return self.path / STATE / "checked" / f"{job.entry.name}.json"

    def made_file(self, job: Job) -> Path:
        """Path of the record of a job's images."""
        return self.path / STATE / "made" / f"{job.name}.json"

    def failed_file(self, job: Job) -> Path:
        """Path of the error of a job."""
        return self.path / STATE / "failed" / f"{job.name}.json"

    def checked(self, job: Job) -> Checked | None:
        """The check of a job's scene; None if it was not checked in its present form."""
        check = _read(self.checked_file(job), Checked)
        return check if check is not None and check.key == job.scene_key else None

    def unchecked(self, jobs: Iterable[Job]) -> list[Job]:
        """A job of each scene to check: scenes that were not checked yet, or were invalid, which may have changed."""
        one_of_each = {job.entry.name: job for job in jobs}.values()
        return [job for job in one_of_each if (check := self.checked(job)) is None or check.error is not None]

    def failure(self, job: Job) -> str | None:
        """Why a job failed; None if it did not."""
        failure = _read(self.failed_file(job), Failed)
        return failure.error if failure is not None and failure.key == job.key else None

    def has(self, job: Job) -> bool:
        """Whether all images of a job are there, as they were written."""
        record = _read(self.made_file(job), MadeRecord)
        return record is not None and record.key == job.key and all(
            holds(self.image(job, seed), record.sha256.get(seed)) for seed in job.seeds
        )  # fmt: skip

    def missing(self, jobs: Iterable[Job]) -> list[Job]:
        """The jobs whose images are not all there; reads every image."""
        return [job for job in jobs if not self.has(job)]

    def foreign(self, job: Job) -> Path | None:
        """An image with a job's name that was made in another way, or None."""
        record = _read(self.made_file(job), MadeRecord)
        if record is not None and record.key == job.key:
            return None
        return next((path for seed in job.seeds if (path := self.image(job, seed)).exists()), None)

    def write_index(self, results: Sequence[Result]) -> Path:
        """Writes the list of all images, a JSON object in each line."""
        path = self.path / "images.jsonl"
        lines = [
            {
                "image": None if r.path is None else r.path.name, "name": r.name, "seed": r.seed,
                "source": r.source, "error": r.error, "method": r.method, "reason": r.reason,
            }
            for r in results
        ]  # fmt: skip
        write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        return path


def _read(path: Path, kind: type[_Stored]) -> _Stored | None:
    """The content of a file; None if it is damaged, so that its work is repeated."""
    try:
        return read(path, kind)
    except FileError:
        return None
