"""A batch on a Ray cluster: machines that share no folder.

One worker (a Ray actor) per GPU, or per share of CPUs, opens the model. Files of the model, LoRAs and images travel
once to each node, through Ray's object store. Images come back to the driver, which stores them as without Ray. If a
worker dies, another one repeats its call.
"""

import logging
import os
import shutil
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray  # pyright: ignore[reportMissingImports]
from ray.exceptions import RayError, RayTaskError  # pyright: ignore[reportMissingImports]

from lora_compose.compose.batch.entries import Entry
from lora_compose.compose.batch.jobs import Job, make_jobs
from lora_compose.compose.batch.results import Folder, Result
from lora_compose.compose.batch.runner import OnProgress, check_names, results_of
from lora_compose.compose.batch.settings import BatchSettings
from lora_compose.compose.batch.worker import Worker, encoded, error_text
from lora_compose.compose.files.atomic import write_whole
from lora_compose.compose.files.paths import is_hub_name, moved
from lora_compose.compose.generate.facts import file_hash
from lora_compose.compose.generate.machine import versions
from lora_compose.compose.generate.making import Made
from lora_compose.compose.generate.processes import own_device
from lora_compose.compose.playground.assets import PLAYGROUNDS
from lora_compose.compose.support.terminal import echo, err
from lora_compose.pipelines.concepts.finding import find_file
from lora_compose.pipelines.concepts.sources import files_of
from lora_compose.pipelines.scene import Run

logger = logging.getLogger(__name__)

LOCAL = "local"
TRIES = 3
"""Number of workers that die of a call before it counts as failed."""

PATIENCE = 300.0
"""Seconds without any worker after which the driver gives up."""

_LEFT_OUT = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".onnx", ".h5")
"""Files of a model's folder that are never opened."""


@dataclass(frozen=True)
class Parcel:
    """Files that a call needs.

    Attributes:
        files: Contents in the object store, by path below a node's folder.
        moves: Paths on a node, by the paths in the run.
    """

    files: Mapping[str, Any] = field(default_factory=dict)
    moves: Mapping[str, str] = field(default_factory=dict)

    def unpacked(self, run: Run, folder: Path) -> Run:
        """The run with the files of a node, written there unless they are there already."""
        for name, content in self.files.items():
            if not (path := folder / name).exists():
                write_whole(path, ray.get(content).tofile)
        return moved(run, lambda source: str(folder / self.moves[source]) if source in self.moves else source)


class Packer:
    """Puts files into the object store, each once."""

    def __init__(self) -> None:
        self._content: dict[str, Any] = {}

    def model(self, source: str) -> Parcel:
        """The files of a model; none for the playground and models on the hub."""
        path = Path(source).expanduser()
        if source in PLAYGROUNDS or not path.exists():
            return Parcel()
        if path.is_file():
            return self._file(source, path)
        inside = [file for file in sorted(path.rglob("*")) if file.is_file() and file.suffix not in _LEFT_OUT]
        files = {f"model/{file.relative_to(path).as_posix()}": self._put(file) for file in inside}
        return Parcel(files, {source: "model"})

    def scene(self, run: Run) -> Parcel:
        """The LoRAs and images of a scene."""
        scene = run.scene
        loras = [source for concept in scene.concepts for source in files_of(concept.lora)]
        images = [scene.image, scene.mask_image, *(concept.region for concept in scene.concepts)]
        files: dict[str, Any] = {}
        moves: dict[str, str] = {}
        for source in loras:
            if source.partition(":")[0] not in PLAYGROUNDS and not _on_hub(source):
                self._add(source, find_file(source), files, moves)
        for source in images:
            if isinstance(source, str) and (path := Path(source).expanduser()).is_file():
                self._add(source, path, files, moves)
        return Parcel(files, moves)

    def _add(self, source: str, path: Path, files: dict[str, Any], moves: dict[str, str]) -> None:
        parcel = self._file(source, path)
        files.update(parcel.files)
        moves.update(parcel.moves)

    def _file(self, source: str, path: Path) -> Parcel:
        name = f"files/{file_hash(str(path))}/{path.name}"
        return Parcel({name: self._put(path)}, {source: name})

    def _put(self, path: Path) -> Any:
        sha256 = file_hash(str(path))
        if sha256 not in self._content:
            self._content[sha256] = ray.put(np.fromfile(path, dtype=np.uint8))  # read on a node without a copy
        return self._content[sha256]


def _on_hub(source: str) -> bool:
    return is_hub_name(source) and not Path(source).exists()


class RemoteWorker:
    """A worker on a node."""

    def __init__(self) -> None:
        self._worker: Worker | None = None
        context = ray.get_runtime_context()
        self._folder = _node_folder(f"{context.get_job_id()}-{context.get_node_id()}")

    def open(self, settings: BatchSettings, run: Run, parcel: Parcel) -> dict[str, str]:
        """Opens the model; returns the versions of its packages."""
        here = parcel.unpacked(run, self._folder)
        self._worker = Worker.open(settings.model_copy(update={"model": here.model}), own_device(settings.device))
        return versions()

    def check(self, job: Job, parcel: Parcel) -> str | None:
        """As `Worker.check`."""
        return self._opened().check(parcel.unpacked(job.run, self._folder))

    def make(self, job: Job, parcel: Parcel) -> list[Made]:
        """As `Worker.make`; the records name files as the driver does."""
        return [
            Made(one.image, one.record.model_copy(update={"run": one.record.run.model_copy(update={
                "scene": job.run.scene, "model": job.run.model
            })}))
            for one in self._opened().make(parcel.unpacked(job.run, self._folder), job.seeds)
        ]  # fmt: skip

    def close(self) -> None:
        """Removes the files of the node."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _opened(self) -> Worker:
        if self._worker is None:
            raise RuntimeError("the model has not been opened")
        return self._worker


def _node_folder(name: str) -> Path:
    """A folder of this node and job, checked to be owned by this user."""
    folder = Path(tempfile.gettempdir()) / f"lora-compose-{name}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or (hasattr(os, "getuid") and folder.stat().st_uid != os.getuid()):
        raise PermissionError(f"{folder} belongs to another user")
    return folder


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
    """Makes the images of a batch on a Ray cluster; they are those of `run_batch`.

    Args:
        entries: As for `run_batch`.
        settings: As for `run_batch`.
        out: A folder of this machine.
        address: Of the cluster, as `ray.init` takes it; "local" starts one on this machine.
        on_progress: As for `run_batch`.
        replace: As for `run_batch`.
        workers: How many; None is one per GPU, or one per node if there are none.

    Raises:
        ValueError: As `run_batch`.
        OSError: If there is no such cluster, or no worker is left.
    """
    folder, report = Folder(Path(out)), on_progress or (lambda *args: None)
    jobs, bad = make_jobs(entries, settings)
    check_names(folder, jobs, replace)
    left = [job for job in jobs if not folder.has(job)]
    if left:
        with _connected(address):
            _make(folder, settings, left, len(jobs) - len(left), report, workers)
    report(len(jobs))
    return results_of(folder, jobs, bad)


@contextmanager
def _connected(address: str) -> Iterator[None]:
    """A cluster; an existing connection is used, and stays open."""
    ours = not ray.is_initialized()
    if ours:
        dashboard = {"include_dashboard": False} if address == LOCAL else {}
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **dashboard)
    try:
        yield
    finally:
        if ours:
            ray.shutdown()


def _make(
    folder: Folder, settings: BatchSettings, jobs: Sequence[Job], done: int, report: OnProgress, workers: int | None
) -> None:
    packer = Packer()
    parcels = {job.entry.name: packer.scene(job.run) for job in jobs}
    pool = Pool(settings, jobs[0].run, packer.model(settings.model), workers)
    scenes = list({job.entry.name: job for job in jobs}.values())
    unchecked = folder.unchecked(jobs)
    if unchecked:
        report(done, f"checking {len(unchecked)} scenes")
    try:
        for job, found, error in pool.map("check", [(job, parcels[job.entry.name]) for job in unchecked]):
            folder.keep_check(job, wrong := error or found)
            if wrong is not None:
                logger.error("%s: %s", job.entry.source, wrong)
        report(done, f"composing into {folder.path}")
        possible = {job.entry.name for job in scenes if (known := folder.checked(job)) and known.error is None}
        tasks = [(job, parcels[job.entry.name]) for job in jobs if job.entry.name in possible]
        done += len(jobs) - len(tasks)
        for job, images, error in pool.map("make", tasks):
            if error is not None:
                logger.error("%s: %s", job.entry.source, error)
                folder.keep_failure(job, error)
            else:
                folder.keep(job, encoded(images))
            done += 1
            report(done)
    finally:
        pool.close()


class Pool:
    """Workers on a cluster, each at one call at a time; a dead one is replaced where there is room.

    Args:
        settings: Those of the batch.
        run: Any run of the batch, whose model is opened.
        model: The files of the model.
        workers: How many; None is one per GPU, or one per node if there are none.
    """

    def __init__(self, settings: BatchSettings, run: Run, model: Parcel, workers: int | None) -> None:
        gpus = int(ray.cluster_resources().get("GPU", 0)) if settings.device in (None, "cuda") else 0
        nodes = sum(node["Alive"] for node in ray.nodes())
        self._needs = {"num_gpus": 1, "num_cpus": 0} if gpus else {"num_cpus": settings.threads or 1}
        self._settings, self._run, self._model = settings, run, model
        self._opening: dict[Any, Any] = {}
        self._idle: list[Any] = []
        self._seen = time.monotonic()
        for _ in range(workers or gpus or nodes):
            self._add()

    def map(self, method: str, tasks: Iterable[tuple[Job, Parcel]]) -> Iterator[tuple[Job, Any, str | None]]:
        """Calls a method of workers for every task.

        Yields:
            Tasks in the order in which they end: the job, its result, and its error.

        Raises:
            ValueError: If the model cannot be opened.
            OSError: If no worker is left.
        """
        waiting, busy = deque(tasks), {}
        deaths: Counter[str] = Counter()
        while waiting or busy:
            while waiting and self._idle:
                task, worker = waiting.popleft(), self._idle.pop()
                busy[getattr(worker, method).remote(*task)] = worker, task
            self._check_patience(bool(busy))
            ready, _ = ray.wait([*busy, *self._opening], num_returns=1, timeout=1.0)
            for one in ready:
                if one in self._opening:
                    self._opened(one)
                    continue
                worker, task = busy.pop(one)
                try:
                    found = ray.get(one)
                except RayTaskError as error:
                    self._idle.append(worker)
                    yield task[0], None, error_text(error.cause or error)
                except RayError as error:  # the worker or its node has died, or cannot be reached
                    self._replace(worker)
                    deaths[task[0].name] += 1
                    if deaths[task[0].name] < TRIES:
                        echo("warning: a worker has died; another does its work", style="yellow", to=err)
                        waiting.appendleft(task)
                    else:
                        yield task[0], None, f"{TRIES} workers have died of it: {error_text(error)}"
                else:
                    self._idle.append(worker)
                    yield task[0], found, None

    def close(self) -> None:
        """Ends the workers and removes their files."""
        if closing := [worker.close.remote() for worker in self._idle]:
            ray.wait(closing, num_returns=len(closing), timeout=10)
        for worker in [*self._idle, *self._opening.values()]:
            ray.kill(worker)

    def _add(self) -> None:
        worker = ray.remote(RemoteWorker).options(scheduling_strategy="SPREAD", **self._needs).remote()
        self._opening[worker.open.remote(self._settings, self._run, self._model)] = worker

    def _opened(self, one: Any) -> None:
        worker = self._opening.pop(one)
        try:
            found = ray.get(one)
        except RayTaskError as error:
            raise ValueError(error_text(error.cause or error)) from error
        except RayError:
            self._replace(worker)
            return
        self._idle.append(worker)
        if differ := sorted(name for name, own in versions().items() if found.get(name) != own):
            names = ", ".join(differ)
            echo(f"warning: a node has another version of {names}; pixels may differ", style="yellow", to=err)

    def _replace(self, worker: Any) -> None:
        ray.kill(worker)
        self._add()

    def _check_patience(self, busy: bool) -> None:
        if busy or self._idle:
            self._seen = time.monotonic()
        elif time.monotonic() - self._seen > PATIENCE:
            raise ChildProcessError(
                "the cluster has no room for a worker. What is finished is kept; the same command resumes"
            )
