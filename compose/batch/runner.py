"""Generates the images of a batch; resumes after an interruption and keeps finished images.

Any number of processes on any number of machines that share the folder work at it together, as in an evaluation: each
claims one call after the other. First all scenes are checked with the model, then images are made.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from lora_compose.compose.batch.entries import Entry, InvalidEntry
from lora_compose.compose.batch.jobs import Job, make_jobs
from lora_compose.compose.batch.pieces import Check, Images
from lora_compose.compose.batch.results import NO_CHOICE, Folder, Result
from lora_compose.compose.batch.settings import BatchSettings
from lora_compose.compose.batch.worker import Worker
from lora_compose.compose.cluster.opening import Cluster, workers
from lora_compose.compose.cluster.packing import Packer, Parcel
from lora_compose.compose.cluster.work import OnProgress, Opening, Progress, Workers
from lora_compose.compose.files.atomic import check_writable
from lora_compose.compose.files.claims import PATIENCE, Claims
from lora_compose.compose.files.stored import changed
from lora_compose.compose.generate.defaults import FIELDS, complete
from lora_compose.compose.generate.early import check_early
from lora_compose.compose.generate.model_facts import facts_of
from lora_compose.pipelines.scene.scene import Run, Scene


def run_batch(
    entries: Sequence[Entry],
    settings: BatchSettings,
    out: str | Path,
    on_progress: OnProgress | None = None,
    *,
    replace: bool = False,
    patience: float = PATIENCE,
    cluster: Cluster | None = None,
) -> list[Result]:
    """Makes the images of a batch until all are there, made by this process or by others, and returns them in order.

    Existing images are not made again, unless they are damaged or (with `replace`) were made in another way. A call
    that fails is tried once, and does not stop the others. Invalid scenes are found before the first image, and before
    the model is opened where it is not needed for that. Without a heartbeat for `patience` seconds, the work of another
    process is taken over. On a cluster the images are the same, and are stored by this process.

    Raises:
        ValueError: If the model cannot be opened, a setting is unknown, or there are images of the same names that were
            made in another way; nothing has been made then.
        OSError: If images cannot be written; those so far are kept. If there is no such cluster, or no worker is left.
    """
    settings, _ = with_defaults(settings)
    folder = Folder(Path(out))
    jobs, bad = make_jobs(entries, settings)
    check_names(folder, jobs, replace)
    make_missing(folder, jobs, folder.missing(jobs), settings, on_progress, patience=patience, cluster=cluster)
    return results_of(folder, jobs, bad)


def make_missing(
    folder: Folder,
    jobs: Sequence[Job],
    missing: Sequence[Job],
    settings: BatchSettings,
    on_progress: OnProgress | None = None,
    *,
    patience: float = PATIENCE,
    cluster: Cluster | None = None,
) -> None:
    """Makes the images of a batch that are missing, as `run_batch` does, whose names and settings are checked."""
    report = on_progress or (lambda *args: None)
    if left := _possible(folder, missing, settings, here=cluster is None):
        check_writable(folder.path / "0.png")
        progress = Progress(report, len(jobs) - len(left))
        with workers(partial(_opening, settings, left), settings.device, settings.threads, cluster) as opened:
            _make_all(opened, folder, left, Claims(folder.claims, patience), progress)
    report(len(jobs))


def with_defaults(settings: BatchSettings) -> tuple[BatchSettings, str]:
    """The settings with the model's and device's defaults, and a line about what was chosen; empty if nothing was.

    Raises ValueError if the device is not there, or there is no such model.
    """
    given = {name: getattr(settings, name) for name in FIELDS if name in settings.model_fields_set}
    if len(given) == len(FIELDS):
        return settings, ""
    run, told = complete(Run(scene=Scene(prompt="-"), model=settings.model, device=settings.device, **given))
    return settings.model_copy(update={name: getattr(run, name) for name in FIELDS}), told


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


def _possible(folder: Folder, jobs: Sequence[Job], settings: BatchSettings, *, here: bool) -> list[Job]:
    """The jobs of scenes in which nothing is wrong that can be seen before the model is opened; stores what is.

    Args:
        here: Whether they are made on this machine.
    """
    refused, facts = set(), facts_of(settings.model) if jobs else None
    for job in folder.unchecked(jobs):
        try:
            check_early(job.run, facts, here=here)
        except (ValueError, OSError) as error:
            refused.add(job.entry.name)
            known = folder.checked(job)
            if known is None or known.error != str(error):  # another process has just found it
                Check(folder, job, None).keep_failure(str(error))
    return [job for job in jobs if job.entry.name not in refused]


def _opening(settings: BatchSettings, jobs: Iterable[Job], packer: Packer | None) -> Opening:
    if packer is None:
        return partial(Worker.open, settings, Parcel(), {})
    scenes = {job.entry.name: packer.named_by(job.run.scene) for job in jobs}
    return partial(Worker.open, settings, packer.named_by(settings.bare_run), scenes)


def _make_all(opened: Workers, folder: Folder, jobs: Sequence[Job], claims: Claims, progress: Progress) -> None:
    """Checks scenes, and makes the images of those that can be made."""
    unchecked = folder.unchecked(jobs)
    if unchecked:
        progress.report(progress.done, f"checking {len(unchecked)} scenes")
    checks = {f"~{job.entry.name}": Check(folder, job, changed(folder.checked_file(job))) for job in unchecked}
    opened.work(Worker.check, claims, checks)
    progress.report(progress.done, f"composing into {folder.path}")
    images = {job.name: Images(folder, job, changed(folder.failed_file(job))) for job in jobs}
    opened.work(Worker.make, claims, images, progress)
