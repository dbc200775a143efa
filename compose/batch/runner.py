"""Generates the images of a batch; resumes after an interruption and keeps finished images.

Any number of processes on any number of machines that share the folder work at it together, as in an evaluation: each
claims one call after the other. First all scenes are checked with the model, then images are made.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from lora_compose.compose.batch.entries import Entry, InvalidEntry
from lora_compose.compose.batch.jobs import Job, make_jobs
from lora_compose.compose.batch.results import NO_CHOICE, Folder, Result, changed
from lora_compose.compose.batch.settings import BatchSettings
from lora_compose.compose.batch.worker import Worker, encoded
from lora_compose.compose.files.claims import Claim, Claims
from lora_compose.compose.generate.defaults import complete
from lora_compose.compose.generate.processes import own_device
from lora_compose.compose.support.errors import error_text
from lora_compose.pipelines.scene.scene import Run, Scene

logger = logging.getLogger(__name__)

PATIENCE = 60.0
"""Seconds without a heartbeat after which a process counts as dead."""

OnProgress = Callable[..., None]
"""Called with the number of finished calls, fractions included, and sometimes a new text."""


def run_batch(
    entries: Sequence[Entry],
    settings: BatchSettings,
    out: str | Path,
    on_progress: OnProgress | None = None,
    *,
    replace: bool = False,
    patience: float = PATIENCE,
    make: Callable[[Folder, BatchSettings, Sequence[Job], int, OnProgress], None] | None = None,
) -> list[Result]:
    """Makes the images of a batch until all are there, made by this process or by others, and returns them in order.

    Existing images are not made again, unless they are damaged or (with `replace`) were made in another way. A call
    that fails is tried once, and does not stop the others. Invalid scenes are found before the first image. Without a
    heartbeat for `patience` seconds, the work of another process is taken over. `make` runs the remaining jobs
    elsewhere, as on Ray.

    Raises:
        ValueError: If the model cannot be opened, a setting is unknown, or there are images of the same names that were
            made in another way; nothing has been made then.
        OSError: If images cannot be written; those so far are kept.
    """
    settings = with_defaults(settings)
    folder, report = Folder(Path(out)), on_progress or (lambda *args: None)
    jobs, bad = make_jobs(entries, settings)
    check_names(folder, jobs, replace)
    left = [job for job in jobs if not folder.has(job)]
    if left:
        done = len(jobs) - len(left)
        if make is None:
            _Making(folder, settings, patience, report).make(left, done)
        else:
            make(folder, settings, left, done, report)
    report(len(jobs))
    return results_of(folder, jobs, bad)


def with_defaults(settings: BatchSettings) -> BatchSettings:
    """The settings with precision, steps and guidance of the model and device, where they name none.

    Raises:
        ValueError: If the device is not there, or there is no such model.
    """
    named = {name: getattr(settings, name) for name in ("dtype", "steps", "guidance_scale")}
    explicit = {name: value for name, value in named.items() if name in settings.model_fields_set}
    if explicit == named:
        return settings
    run, _ = complete(Run(scene=Scene(prompt="-"), model=settings.model, device=settings.device, **explicit))
    return settings.model_copy(update={name: getattr(run, name) for name in named})


def check_names(folder: Folder, jobs: Iterable[Job], replace: bool) -> None:
    """Raises ValueError if images of other settings have the same names and are not to be replaced."""
    foreign = [path for job in jobs if (path := folder.foreign(job)) is not None]
    if foreign and not replace:
        raise ValueError(
            f"{foreign[0]} is there already and was made in another way"
            f"{f' ({len(foreign)} such images)' if len(foreign) > 1 else ''}; choose another folder with --out, or "
            "replace them with --replace"
        )


def results_of(folder: Folder, jobs: Iterable[Job], bad: Iterable[InvalidEntry]) -> list[Result]:
    """The results of a batch, scenes that could not be read included."""
    results = []
    for job in jobs:
        error, checked = None, folder.checked(job)
        if not folder.has(job):
            error = (checked and checked.error) or folder.failure(job) or "it is not there"
        for seed in job.seeds:
            path = folder.image(job, seed) if error is None else None
            choice = NO_CHOICE if checked is None else (checked.method, checked.reason)
            results.append(Result(job.entry.name, seed, job.entry.source, path, error, *choice))
    return [*results, *(Result("", None, entry.source, None, entry.error) for entry in bad)]


class _Making:
    """The work of one process at a batch."""

    def __init__(self, folder: Folder, settings: BatchSettings, patience: float, report: OnProgress) -> None:
        self._folder, self._settings, self._report = folder, settings, report
        self._claims = Claims(folder.claims, patience)
        self._worker: Worker | None = None

    def make(self, jobs: Sequence[Job], done: int) -> None:
        """Checks scenes, and makes the images of those that can be made."""
        scenes = {f"~{job.entry.name}": job for job in self._folder.unchecked(jobs)}
        before = {name: changed(self._folder.checked_file(job)) for name, job in scenes.items()}
        if scenes:
            self._report(done, f"checking {len(scenes)} scenes")

        def check(name: str, claim: Claim) -> None:
            job = scenes[name]
            if changed(self._folder.checked_file(job)) == before[name]:  # else another process has just checked it
                worker = self._opened()
                try:
                    choice, error = worker.check(job.run), None
                except Exception as wrong:  # whatever models and libraries raise
                    choice, error = NO_CHOICE, error_text(wrong)
                self._folder.keep_check(job, error, choice)

        self._claims.work(scenes, check)
        self._make_checked({job.name: job for job in jobs}, done)

    def _make_checked(self, jobs: dict[str, Job], done: int) -> None:
        before = {name: changed(self._folder.failed_file(job)) for name, job in jobs.items()}
        self._report(done, f"composing into {self._folder.path}")

        def make(name: str, claim: Claim) -> None:
            nonlocal done
            if self._folder.is_pending(jobs[name], before[name]):
                self._make_one(jobs[name], claim, done)
            done += 1
            self._report(done)

        self._claims.work(jobs, make)

    def _make_one(self, job: Job, claim: Claim, done: int) -> None:
        try:
            images = self._opened().make(job.run, job.seeds, lambda share: self._report(done + share))
        except Exception as error:  # whatever models and libraries raise
            logger.error("%s: %s", job.entry.source, error_text(error), exc_info=logger.isEnabledFor(logging.DEBUG))
            self._folder.keep_failure(job, error_text(error))
            return
        if not claim.held:
            logger.warning("%s was taken over by another process: this one had given no sign of life", job.name)
            return
        self._folder.keep(job, encoded(images))

    def _opened(self) -> Worker:
        self._worker = self._worker or Worker.open(self._settings, own_device(self._settings.device))
        return self._worker
