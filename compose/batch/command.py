"""`lora-compose batch`: runs a batch in one process or several, and shows the results."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lora_compose.compose.batch.entries import BatchScenes, Entry
from lora_compose.compose.batch.jobs import Job, make_jobs
from lora_compose.compose.batch.results import Folder, Result
from lora_compose.compose.batch.runner import check_names, make_missing, results_of, with_defaults
from lora_compose.compose.batch.settings import BatchSettings
from lora_compose.compose.cluster.opening import Cluster
from lora_compose.compose.files.claims import Claims
from lora_compose.compose.files.paths import moved_weights, to_record
from lora_compose.compose.files.stored import changed, write_text
from lora_compose.compose.generate.processes import default_number, launch, local_rank
from lora_compose.compose.support.terminal import BAD_INPUT, FAILED, bar, echo, err

SHOWN = 20
"""Most errors that are shown; all of them are in images.jsonl."""


def make_all(
    batch: BatchScenes,
    settings: BatchSettings,
    out: Path,
    processes: int | None = None,
    *,
    replace: bool = False,
    ray: str | None = None,
) -> int:
    """Generates the images of a batch and returns the exit code; a rerun resumes, further processes join in.

    `processes` are one per GPU by default, and with a Ray cluster (`ray`: its address, or "local") one per node if
    there are none. `replace` replaces images of the same names that were made in another way. Raises ValueError if
    nothing can be made, and OSError if all processes were killed, or images cannot be written.
    """
    settings, told = with_defaults(settings)
    if local_rank():  # a launcher has started several; only the first one prints
        join(batch.entries, settings, out, replace=replace)
        return 0
    jobs, missing = make_jobs(batch.entries, settings)
    bad = [*batch.bad, *missing]
    _show_errors([entry.error for entry in bad])
    if not jobs:
        return BAD_INPUT
    folder = Folder(out)
    check_names(folder, jobs, replace)
    entries = list({job.entry.name: job.entry for job in jobs}.values())
    left = folder.missing(jobs)
    echo(_summary(jobs, left, out), to=err)
    if told:
        echo(told, to=err)
    before = {job.name: changed(folder.made_file(job)) for job in left}

    def done() -> int:
        return len(jobs) - sum(changed(folder.made_file(job)) == before[job.name] for job in left)

    with bar(f"composing into {out}", len(jobs)) as on_progress:
        number = processes or default_number(1, settings.device)
        if ray is None and number > 1 and left:
            write_plan(folder.plan, entries, settings)
            arguments = ["batch", str(folder.plan), "--out", str(out), "--join", *(["--replace"] if replace else [])]
            code = launch(arguments, number, settings.threads or 1, lambda: on_progress(done()))
            if code and done() < len(jobs):
                return code
        else:
            cluster = None if ray is None else Cluster(ray, processes)
            make_missing(folder, jobs, left, settings, on_progress, cluster=cluster)
    return _show_results(folder, results_of(folder, jobs, bad))


def join(entries: Sequence[Entry], settings: BatchSettings, out: Path, *, replace: bool = False) -> None:
    """Makes what is missing, as one of several processes of which another shows the results."""
    settings, _ = with_defaults(settings)
    folder, (jobs, _) = Folder(out), make_jobs(entries, settings)
    check_names(folder, jobs, replace)
    make_missing(folder, jobs, folder.missing(jobs), settings)


def _summary(jobs: Sequence[Job], left: Sequence[Job], out: Path) -> str:
    images, missing = (sum(len(job.seeds) for job in some) for some in (jobs, left))
    known = f"; {images - missing} of them are there already" if missing < images else ""
    return f"{len({job.entry.name for job in jobs})} scenes, {images} images, in {out}{known}"


def write_plan(path: Path, entries: Sequence[Entry], settings: BatchSettings) -> None:
    """Writes scenes and settings as a batch file that is valid on the whole machine."""
    scenes = [
        {
            "name": entry.name, **entry.scene.model_dump(mode="json", exclude_defaults=True),
            **({} if entry.seeds is None else {"seeds": entry.seeds}),
        }
        for entry in entries
    ]  # fmt: skip
    files = {"model": to_record(settings.model), "quantize": moved_weights(settings.quantize, to_record)}
    about = settings.model_copy(update=files).model_dump(mode="json", exclude_none=True)
    write_text(path, json.dumps({**about, "scenes": scenes}, ensure_ascii=False) + "\n")


def _show_results(folder: Folder, results: Sequence[Result]) -> int:
    """Reports the outcome of a batch; returns the exit code."""
    failed = [result for result in results if result.error is not None]
    with Claims(folder.claims).claim("index") as claim:
        if claim is not None:
            folder.write_index(results)
    echo(f"{len(results) - len(failed)} images in {folder.path}, listed in images.jsonl", style="bold")
    chosen = Counter((r.method, r.reason) for r in results if r.error is None and r.method is not None)
    for (method, reason), number in chosen.most_common():
        echo(f"{number} by {method}, because {reason}")
    if not failed:
        return 0
    errors = (f"{r.source}: {r.error}" if r.seed is not None else r.error or "" for r in failed)
    _show_errors(list(dict.fromkeys(errors)))
    echo(f"{len(failed)} are missing; the same command tries them again.", style="red", to=err)
    return FAILED


def _show_errors(errors: Sequence[str]) -> None:
    for error in errors[:SHOWN]:
        echo(f"error: {error}", style="red", to=err)
    if len(errors) > SHOWN:
        echo(f"error: ... and {len(errors) - SHOWN} more", style="red", to=err)
