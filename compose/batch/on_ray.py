"""A batch on a Ray cluster: machines that share no folder. Images come back to the driver, which stores them."""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from lora_compose.compose.batch.entries import Entry
from lora_compose.compose.batch.jobs import Job
from lora_compose.compose.batch.results import NO_CHOICE, ChosenMethod, Folder, Result, changed
from lora_compose.compose.batch.runner import PATIENCE, OnProgress, run_batch
from lora_compose.compose.batch.settings import BatchSettings
from lora_compose.compose.batch.worker import Worker, encoded
from lora_compose.compose.cluster.connecting import connected
from lora_compose.compose.cluster.packing import Node, Parcel, named_as
from lora_compose.compose.cluster.pool import Ended, Pool, object_packer
from lora_compose.compose.files.claims import Claim, Claims
from lora_compose.compose.files.paths import moved
from lora_compose.compose.generate.making import Made
from lora_compose.compose.generate.processes import own_device
from lora_compose.pipelines.support.quantising import QUANTISED

logger = logging.getLogger(__name__)


def run_on_ray(
    entries: Sequence[Entry],
    settings: BatchSettings,
    out: str | Path,
    address: str,
    on_progress: OnProgress | None = None,
    *,
    replace: bool = False,
    workers: int | None = None,
) -> list[Result]:
    """Makes the images of a batch on a Ray cluster; they are those of `run_batch`, which may join in.

    `address` is as `ray.init` takes it, "local" starts a cluster on this machine; by default there is a worker per GPU,
    or per node if there are none.

    Raises:
        ValueError: As `run_batch`.
        OSError: If there is no such cluster, or no worker is left.
    """

    def make(folder: Folder, settings: BatchSettings, left: Sequence[Job], done: int, report: OnProgress) -> None:
        with connected(address):
            packer = object_packer()
            weights = None if settings.quantize in (None, *QUANTISED) else packer.source(settings.quantize)
            opening = partial(_open, settings, packer.source(settings.model), weights)
            parcels = {job.entry.name: packer.scene(job.run.scene) for job in left}
            with Pool(opening, settings.device, settings.threads, workers) as pool:
                _make_all(pool, folder, left, parcels, done, report)

    return run_batch(entries, settings, out, on_progress, replace=replace, make=make)


def _make_all(
    pool: Pool, folder: Folder, jobs: Sequence[Job], parcels: dict[str, Parcel], done: int, report: OnProgress
) -> None:
    scenes = {job.entry.name: job for job in folder.unchecked(jobs)}
    if scenes:
        report(done, f"checking {len(scenes)} scenes")
    for name, choice, error in pool.map(_check, {name: (job, parcels[name]) for name, job in scenes.items()}):
        folder.keep_check(scenes[name], error, choice or NO_CHOICE)
    named = {job.name: job for job in jobs}
    before = {job.name: changed(folder.failed_file(job)) for job in jobs}
    report(done, f"composing into {folder.path}")

    def count() -> None:
        nonlocal done
        done += 1
        report(done)

    def start(name: str) -> tuple[Job, Parcel] | None:
        job = named[name]
        if folder.is_pending(job, before[name]):
            return job, parcels[job.entry.name]
        count()
        return None

    def end(ended: Ended, claim: Claim) -> None:
        job = named[ended.name]
        if not claim.held:
            logger.warning("%s was taken over by another process: this one had given no sign of life", job.name)
        elif ended.error is not None:
            logger.error("%s: %s", job.entry.source, ended.error)
            folder.keep_failure(job, ended.error)
        else:
            folder.keep(job, encoded(ended.result))
        count()

    pool.work(_make, Claims(folder.claims, PATIENCE), named, start, end)


def _open(settings: BatchSettings, model: Parcel, weights: Parcel | None, node: Node) -> Worker:
    here = {"model": node.unpack(model)(settings.model)}
    if weights is not None and settings.quantize is not None:
        here["quantize"] = node.unpack(weights)(settings.quantize)
    return Worker.open(settings.model_copy(update=here), own_device(settings.device))


def _check(worker: Worker, node: Node, job: Job, parcel: Parcel) -> ChosenMethod:
    return worker.check(moved(job.run, node.unpack(parcel)))


def _make(worker: Worker, node: Node, job: Job, parcel: Parcel) -> list[Made]:
    """The images of a job; their records name files as on the driver."""
    return [named_as(image, job.run) for image in worker.make(moved(job.run, node.unpack(parcel)), job.seeds)]
