"""Reproducing an image from its record, and reporting what differs."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lora_compose.compose.files.atomic import check_writable
from lora_compose.compose.files.images import Record, save_image
from lora_compose.compose.files.paths import is_hub_name
from lora_compose.compose.files.stored import holds
from lora_compose.compose.generate.early import check_early
from lora_compose.compose.generate.machine import devices, threads
from lora_compose.compose.generate.making import Made, make_batch
from lora_compose.compose.generate.models import open_model
from lora_compose.compose.playground.assets import lora_source
from lora_compose.compose.support.savers import Saver
from lora_compose.compose.support.terminal import bar, echo
from lora_compose.pipelines.concepts.finding import find_file
from lora_compose.pipelines.scene.scene import Concept, Run
from lora_compose.pipelines.scene.sources import files_of, with_files
from lora_compose.pipelines.support.home import expanded
from lora_compose.pipelines.support.regular import sha256_of


def replay_and_compare(
    record: Record,
    given: Image.Image,
    *,
    out: Path | None = None,
    loras: Path | None = None,
    model: str | None = None,
    savers: Collection[Saver] = (),
) -> bool:
    """Reproduces an image, prints what has changed since, and returns whether all pixels are equal.

    Args:
        given: Its pixels.
        out: Where to write the new image; None means not at all.
        loras: A folder in which LoRA files are looked for, by content.

    Raises:
        ValueError: If LoRAs are missing, reference images are missing or others, the model cannot be opened, or the
            record cannot be run.
        OSError: If the new image cannot be written; the model is not opened then.
    """
    check_images(record)
    run = runnable(record, loras)
    run = run if model is None else run.model_copy(update={"model": model})
    echo(f"{run.model}, {run.method or 'no method'}, seed {run.seed}, {run.steps} steps: {run.scene.prompt}")
    check_early(run)
    if out is not None:
        check_writable(out)
    pipe = open_model(run, savers)
    with threads(record.machine.threads), bar("composing", 1) as on_progress:
        made = remake(pipe, record, run, on_progress)
    if out is not None:
        echo(save_image(made.image, out, made.record))
    for change in changes(record, made.record):
        echo(f"changed: {change}", style="yellow")
    differing = difference(given, made.image)
    echo(
        f"different: {differing}" if differing else "identical: every pixel is the same",
        style="red" if differing else "green",
    )
    return differing is None


def runnable(record: Record, loras: Path | None = None) -> Run:
    """The recorded run with LoRA files and a device that exist on this machine.

    A file counts as the recorded one if its SHA-256 is the same. If a path has no file or another one, the file is
    looked for in `loras`; if it is not there, a changed file is used, and `changes` reports it afterwards.

    Args:
        loras: A folder in which LoRA files are looked for, by content, whatever their names.

    Raises:
        ValueError: If LoRAs are missing; the message lists all of them.
    """
    moved = _by_content(
        {wanted for concept in record.run.scene.concepts for source, wanted in _recorded(record, concept)
         if wanted is not None and not _is_there(source, wanted)},
        loras,
    )  # fmt: skip
    concepts, missing = [], []
    for concept in record.run.scene.concepts:
        places: list[str] = []
        for source, wanted in _recorded(record, concept):
            there = _is_there(source, wanted)
            if not there and wanted not in moved and _local(source) is None and not is_hub_name(source):
                missing.append(f"  {concept.name}: {source or 'no file named'}, SHA-256 {wanted or 'not recorded'}")
            places.append(str(moved[wanted]) if not there and wanted in moved else source)
        concepts.append(concept.model_copy(update={"lora": with_files(concept.lora, [*filter(None, places)])}))
    if missing:
        where = f" nor below {loras}" if loras else ""
        hint = "name their folder with --loras FOLDER; they are found by content"
        raise ValueError("\n".join([f"LoRAs of this image have moved{where}:", *missing, hint]))
    device = record.run.device if record.run.device in devices() else None
    scene = record.run.scene.model_copy(update={"concepts": tuple(concepts)})
    return record.run.model_copy(update={"scene": scene, "device": device})


def check_images(record: Record) -> None:
    """Checks that the reference images of a record are still those that it was made with.

    Raises:
        ValueError: If one is missing or another one now; the message lists all of them.
    """
    wrong = []
    for number, path in enumerate(record.run.scene.references):
        wanted, file = record.images.get(f"references.{number}"), expanded(path)
        if not file.is_file():
            wrong.append(f"  {path}: there is no such file, SHA-256 {wanted or 'not recorded'}")
        elif wanted is not None and sha256_of(file) != wanted:
            wrong.append(f"  {path}: another image, SHA-256 {sha256_of(file)}; it was {wanted}")
    if wrong:
        raise ValueError("\n".join(["reference images of this image are missing or have changed:", *wrong,
                                    "put the files back where they were"]))  # fmt: skip


def remake(pipe: Any, record: Record, run: Run, on_progress: Callable[[float], None] | None = None) -> Made:
    """Reproduces an image, by its runnable run, with those of its batch, because the pixels depend on them."""
    seeds = record.batch or (run.seed,)
    return make_batch(pipe, run, seeds, on_progress).images[seeds.index(run.seed)]


def changes(before: Record, now: Record) -> list[str]:
    """Differences between two records on which an image may depend."""
    pairs = [(name, before.versions.get(name), now.versions.get(name)) for name in {**before.versions, **now.versions}]
    pairs += [
        (f"LoRA of {name}", before.sha256.get(name), now.sha256.get(name)) for name in {**before.sha256, **now.sha256}
    ]
    pairs += [(name, before.images.get(name), now.images.get(name)) for name in {**before.images, **now.images}]
    pairs += [
        (name, getattr(before.machine, name), getattr(now.machine, name)) for name in ("device", "name", "threads")
    ]
    labels = {"name": "processor"}
    if before.together > 1:
        pairs.append(
            ("images in one batch of a server (pixels differ by rounding)", str(before.together), str(now.together))
        )
    return [
        f"{labels.get(name, name)}: was {was or 'none'}, is {is_ or 'none'}" for name, was, is_ in pairs if was != is_
    ]


def difference(first: Image.Image, second: Image.Image) -> str | None:
    """How two images differ, in words; None if every pixel is the same."""
    if first.size != second.size:
        return f"the sizes differ: {first.width} x {first.height} and {second.width} x {second.height} pixels"
    apart = np.abs(np.asarray(first.convert("RGB"), np.int16) - np.asarray(second.convert("RGB"), np.int16))
    pixels = int(apart.any(axis=-1).sum())
    if pixels == 0:
        return None
    share = 100 * pixels / (first.width * first.height)
    return f"{pixels} pixels differ ({share:.3g} %), by at most {apart.max()} and {apart.mean():.3g} on average, of 255"


def _recorded(record: Record, concept: Concept) -> list[tuple[str, str | None]]:
    """The files of a concept, each with its recorded SHA-256."""
    files = files_of(concept.lora) or (() if concept.is_bystander else ("",))
    recorded = record.sha256.get(concept.name, ())
    hashes: tuple[str | None, ...] = (recorded,) if isinstance(recorded, str) else recorded
    return list(zip(files, hashes if len(hashes) == len(files) else [None] * len(files), strict=True))


def _is_there(source: str, sha256: str | None) -> bool:
    """Whether a path still holds the recorded file."""
    file = _local(source)
    return file is not None and holds(file, sha256)  # if it cannot be read, the run will report that


def _local(source: str) -> Path | None:
    try:
        path = expanded(lora_source(source))
        return find_file(path) if source and path.exists() else None
    except (ValueError, RuntimeError):  # nothing usable
        return None


def _by_content(wanted: set[str], folder: Path | None) -> dict[str, Path]:
    paths: dict[str, Path] = {}
    for path in sorted(folder.rglob("*.safetensors")) if folder else ():
        if paths.keys() == wanted:
            break
        if path.is_file() and (sha256 := sha256_of(path)) in wanted:
            paths.setdefault(sha256, path)
    return paths
