"""What an evaluation stores: a folder per batch, with its pictures, how they were made, and how they were scored.

    plan.json                      all batches of the evaluation
    batches/KEY/SEED.png           the pictures, each with its run inside
    batches/KEY/made.json          cost and circumstances; written last, so a batch that has it is complete
    batches/KEY/scores-HASH.json   scores by one way of scoring
    batches/KEY/failed.json        why it failed, in place of the others

Every file appears whole or not at all. Scores hold what was measured; all that tables say is computed from them.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from attention.masks import Box
from compose.evaluation.suite import Suite
from compose.files import FileError, Machine

BATCHES = "batches"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


_Stored = TypeVar("_Stored", bound=_Frozen)


class PictureCost(_Frozen):
    """What one picture cost, on average over its batch.

    Attributes:
        rows_forward: UNet rows run forward.
        rows_stopped: UNet rows run forward in passes that stop early.
        rows_backward: UNet rows run backward.
        flops: Operations of all UNet passes, counted.
        seconds: By the clock, decoding included.
        preparation_seconds: Of those, until the first step.
        peak_bytes: Largest memory that tensors took during the call, for the whole batch; None where PyTorch does not
            tell, on mps.
    """

    rows_forward: float
    rows_stopped: float = 0.0
    rows_backward: float
    flops: float
    seconds: float
    preparation_seconds: float
    peak_bytes: int | None


class Made(_Frozen):
    """A batch of pictures that was made.

    Attributes:
        scene: Name of the scene.
        arm: Name of the arm.
        alone: The concept that acted alone, if the arm is one of those.
        seeds: Of the pictures.
        cost: Of a picture.
        versions: Of the packages that made it.
        machine: What made it.
    """

    scene: str
    arm: str
    alone: str | None = None
    seeds: tuple[int, ...]
    cost: PictureCost
    versions: Mapping[str, str]
    machine: Machine


class ConceptScore(_Frozen):
    """One concept in one picture.

    Attributes:
        box: Where it was found, or its region without a detector; None if it was not found.
        detection: How sure the detector was, 0 to 1; None without a detector, or if it was not found.
        similarity: Of what is in the box to the references of every concept of the scene; empty if it was not found.
        whole: Similarity of the whole picture to the concept's references.
        placed: Whether the middle of the box lies in the concept's region; None without a region or a detector, or if
            it was not found.
    """

    box: Box | None = None
    detection: float | None = None
    similarity: Mapping[str, float] = {}
    whole: float
    placed: bool | None = None


class PictureScores(_Frozen):
    """What was measured on one picture.

    Attributes:
        clip_t: 100 x similarity to the prompt without triggers; None if the encoder reads no text.
        concepts: By name of the scene's concepts.
        extra: Findings that belong to no concept, such as a second cat; None without a detector.
    """

    clip_t: float | None
    concepts: Mapping[str, ConceptScore]
    extra: int | None = None


class Scores(_Frozen):
    """What was measured on a batch, by seed."""

    pictures: Mapping[int, PictureScores]


class Failed(_Frozen):
    """A batch that could not be made or scored.

    Attributes:
        scene: Name of the scene.
        arm: Name of the arm.
        alone: As in `Made`.
        seeds: Of the pictures.
        error: What happened.
    """

    scene: str
    arm: str
    alone: str | None = None
    seeds: tuple[int, ...]
    error: str


class Planned(_Frozen):
    """A batch of an evaluation.

    Attributes:
        key: Names its folder; a hash of all that determines its pictures is part of it.
        scores: Name of the file with its scores; a hash of the way of scoring is part of it.
        scene: Name of the scene.
        arm: Name of the arm.
        alone: As in `Made`.
        seeds: Of the pictures.
    """

    key: str
    scores: str
    scene: str
    arm: str
    alone: str | None = None
    seeds: tuple[int, ...]


class Plan(_Frozen):
    """All batches of an evaluation, and the suite that they come from."""

    suite: Suite
    batches: tuple[Planned, ...]


PLAN, MADE, FAILED = "plan.json", "made.json", "failed.json"


def batch_folder(out: Path, key: str) -> Path:
    """Where a batch is kept."""
    return out / BATCHES / key


def picture_path(out: Path, key: str, seed: int) -> Path:
    """Where a picture is kept."""
    return batch_folder(out, key) / f"{seed}.png"


def clear(out: Path, key: str) -> None:
    """Removes what an interrupted run has left of a batch."""
    shutil.rmtree(batch_folder(out, key), ignore_errors=True)


def write(path: Path, stored: BaseModel) -> None:
    """Writes a file in one step.

    Raises:
        OSError: If it cannot be written; nothing is left behind.
    """
    write_text(path, stored.model_dump_json(indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes text in one step.

    Raises:
        OSError: If it cannot be written; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read(path: Path, kind: type[_Stored]) -> _Stored | None:
    """Reads a file; None if it is not there.

    Raises:
        FileError: If it is unreadable or damaged.
    """
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValidationError as error:
        raise FileError(f"{path} is damaged; delete it, and the next run makes it again") from error
