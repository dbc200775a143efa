"""Stored results of an evaluation: a folder per batch, with images, their costs, and scores.

    plan.json                      all batches of the evaluation
    batches/KEY/SEED.png           the images, each with its run inside
    batches/KEY/made.json          costs, versions and machine; written last, so a batch that has it is complete
    batches/KEY/scores-HASH.json   scores by one encoder and detector
    batches/KEY/failed.json        why it failed, in place of the others

Every file appears whole or not at all. Scores hold raw measurements; tables are computed from them. A damaged file is
not used: its batch counts as not made, or as not scored.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from lora_compose.compose.evaluation.suite import Name, Suite
from lora_compose.compose.files.images import Machine, read_pixels, read_record
from lora_compose.compose.files.reading import FileError
from lora_compose.compose.files.stored import holds, read
from lora_compose.compose.support.frozen import Frozen, shared
from lora_compose.pipelines.scene.mask_images import Box

BATCHES = "batches"


class ImageCost(Frozen):
    """Costs of one image, averaged over its batch.

    Rows are latent rows (`stopped`: in truncated passes), FLOPs those of all passes of the model, counted; seconds
    include decoding and, as `preparation_seconds`, the time until the first step. `peak_bytes` is that of the whole
    batch; None on mps, where PyTorch does not report it.
    """

    rows_forward: float
    rows_stopped: float = 0.0
    rows_backward: float
    flops: float
    seconds: float
    preparation_seconds: float
    peak_bytes: int | None


class _OfBatch(Frozen):
    scene: str
    arm: str
    alone: str | None = None
    seeds: tuple[int, ...]


class Made(_OfBatch):
    """A batch of images that was made, with the cost of an image and what made it.

    `alone` is the concept that acted alone, if the arm is one of those; `sha256`, by seed, is empty if the batch was
    made by a version that did not store checksums.
    """

    cost: ImageCost
    versions: Mapping[str, str]
    machine: Machine
    sha256: Mapping[int, str] = {}


class ConceptScore(Frozen):
    """One concept in one image.

    Attributes:
        box: Where it was found, or its region without a detector; None if it was not found.
        detection: Confidence of the detector, 0 to 1; None without a detector, or if it was not found.
        similarity: Of what is in the box to the references of every concept of the scene; empty if it was not found.
        whole: Similarity of the whole image to the concept's references.
        placed: Whether the middle of the box lies in the concept's region; None without a region or a detector, or if
            it was not found.
        slot: As `similarity`, of what stands in its place: if several concepts of a scene with regions have one class,
            what was found of them goes to the nearest regions. Otherwise the same as `similarity`. Empty if there is
            nothing, and in files of older versions.
        colours: Of a style: mean and spread of red, green and blue in the image, 0 to 1; None of a subject.
    """

    box: Box | None = None
    detection: float | None = None
    similarity: Mapping[str, float] = {}
    whole: float
    placed: bool | None = None
    slot: Mapping[str, float] = {}
    colours: tuple[float, ...] | None = None


class Features(Frozen):
    """What the model of a chosen metric measured on an image.

    Attributes:
        text: 100 x similarity of the image to the prompt without triggers; None if the model reads no text.
        whole: Similarity of the whole image to the references of each concept; those of which the model has none are
            left out, such as faces of a teapot.
        found: Similarity of what was found of each subject to its references; those that were not found are left out.
    """

    text: float | None = None
    whole: Mapping[str, float] = {}
    found: Mapping[str, float] = {}


class ImageScores(Frozen):
    """Measurements of one image.

    `clip_t` is 100 x similarity to the prompt without triggers, None if the encoder reads no text; `extra` counts
    findings that belong to no concept, such as a second cat, None without a detector. `chosen` has the metrics that the
    user chose, by name. `bystanders` has, by name, the similarity of what was found of a bystander to the references of
    every concept of the scene; nothing if it was not found.
    """

    clip_t: float | None
    concepts: Mapping[str, ConceptScore]
    extra: int | None = None
    bystanders: Mapping[str, Mapping[str, float]] = {}
    chosen: Mapping[str, Features] = {}


class Scores(Frozen):
    """Measurements of a batch, by seed.

    `truth` is how alike the references of the scene's subjects are among themselves (`confusion.truth_matrix`), row by
    row; empty in files of older versions.
    """

    truth: Mapping[str, Mapping[str, float]] = {}
    images: Mapping[int, ImageScores]


class Failed(_OfBatch):
    """A batch that could not be made or scored."""

    error: str


class Planned(Frozen):
    """A batch of an evaluation, with the names of its folder and of the file with its scores.

    The first has a hash of everything that determines its images, the second of encoder, detector and references.
    """

    key: Annotated[str, Field(pattern=r"^\w[\w.+-]*$")]
    scores: Annotated[str, Field(pattern=r"^scores-\w+\.json$")]
    scene: Name
    arm: Name
    alone: Name | None = None
    seeds: tuple[int, ...]


class BatchPlan(Frozen):
    """All batches of an evaluation, and the suite that they come from."""

    suite: Suite
    batches: tuple[Planned, ...]


PLAN, MADE, FAILED = "plan.json", "made.json", "failed.json"
CLAIMS = "claims"
"""The folder in which processes claim batches and trainings."""


def batch_folder(out: Path, key: str) -> Path:
    """The folder of a batch."""
    return out / BATCHES / key


def image_path(out: Path, key: str, seed: int) -> Path:
    """The path of an image."""
    return batch_folder(out, key) / f"{seed}.png"


def clear(out: Path, key: str) -> None:
    """Removes the incomplete files of a batch."""
    shutil.rmtree(batch_folder(out, key), ignore_errors=True)


def is_done(out: Path, planned: Planned) -> bool:
    """Whether a batch has been made and scored, judged by which files there are."""
    folder = batch_folder(out, planned.key)
    return (folder / MADE).is_file() and (folder / planned.scores).is_file()


def read_made(out: Path, planned: Planned) -> Made | None:
    """How a batch was made, None if it was not; its images are not looked at. FileError if that is damaged."""
    made = read(path := batch_folder(out, planned.key) / MADE, Made)
    if made is not None and shared(_OfBatch.model_fields, made) != shared(_OfBatch.model_fields, planned):
        raise FileError(f"{path} is of another batch")
    return made


def read_scores(out: Path, planned: Planned, concepts: Sequence[str]) -> Scores | None:
    """The scores of a batch of these concepts; None if there are none. FileError if they are damaged."""
    scores = read(path := batch_folder(out, planned.key) / planned.scores, Scores)
    if scores is None:
        return None
    for seed in planned.seeds:
        if lost := set(concepts) - set(scores.images[seed].concepts if seed in scores.images else ()):
            raise FileError(f"{path} is damaged: seed {seed} lacks {', '.join(sorted(lost))}")
    return scores


def check_images(out: Path, planned: Planned, made: Made) -> None:
    """Reads the images of a batch; FileError if one is missing, or is not what was written.

    Images of versions that stored no checksums only have to be readable, with a record of the right seed.
    """
    for seed in planned.seeds:
        path = image_path(out, planned.key, seed)
        if not made.sha256:
            read_pixels(path)
            intact = read_record(path).run.seed == seed
        else:
            intact = holds(path, made.sha256.get(seed))
        if not intact:
            raise FileError(f"{path} is missing, or is not the image that was written")
