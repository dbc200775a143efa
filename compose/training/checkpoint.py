"""Checkpoints: a training resumes where it was stopped, bit-identically, or fails with the reason."""

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_compose.compose.files.atomic import write_whole
from lora_compose.compose.training.settings import Training

_VERSION = 2
# Settings that may differ when a training is resumed; images are compared by their content.
_FREE = {
    "images", "references", "out", "class_images", "class_count", "class_steps", "gradient_checkpointing", "save_dtype",
    "checkpoint_every", "sample_every", "sample_prompts", "sample_guidance", "cpu", "threads",
}  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint that cannot be resumed; the message says why and what to do."""


class FullError(OSError):
    """A checkpoint that could not be written; the last good one is still there."""


def save_checkpoint(path: Path, state: Mapping[str, Any], settings: Training, data: str, processes: int) -> None:
    """Writes a checkpoint of a state with "step"; an earlier one stays until it is complete. FullError if it cannot.

    `data` is the digest of the images. With another number of processes a step would have other rows.
    """
    buffer = io.BytesIO()
    compared = json.dumps(_compared(settings, processes))
    torch.save({"version": _VERSION, "settings": compared, "data": data, **state}, buffer)
    try:
        write_whole(path, buffer.getvalue())
    except OSError as error:
        kept = "there is no earlier one. Free some space and run the same command again"
        if path.exists():
            kept = f"the one before it is kept in {path}. Free some space; the same command resumes (without --fresh)"
        raise FullError(
            f"the checkpoint at step {state['step']} could not be written ({len(buffer.getvalue()) / 2**20:.1f} MB to "
            f"{path.parent}): {error.strerror or error}; {kept}"
        ) from error


def load_checkpoint(path: Path, settings: Training, data: str, processes: int) -> dict[str, Any]:
    """Reads a checkpoint. Raises CheckpointError if it is damaged, or of other settings, images or processes."""
    anew = "start over with --fresh"
    try:
        state = torch.load(io.BytesIO(_intact(path.read_bytes())), map_location="cpu", weights_only=True)
        known = json.loads(state["settings"])
        version, step = state["version"], int(state["step"])
    except Exception as error:  # whatever a parser makes of what is no checkpoint
        raise CheckpointError(f"the checkpoint {path} is damaged: {str(error)[:300]}; {anew}") from error
    if version != _VERSION:
        raise CheckpointError(f"the checkpoint {path} is of another version of lora-compose; {anew}")
    changed = _changes(known, _compared(settings, processes))
    if state["data"] != data:
        changed.append("the images or captions have changed")
    if changed:
        raise CheckpointError(
            f"{path} is a checkpoint at step {step} of another training:\n  " + "\n  ".join(changed)
            + f"\nUse the settings it was started with to resume, or {anew}"
        )  # fmt: skip
    return state


def _intact(content: bytes) -> bytes:
    """A checkpoint's bytes as they were written: torch.save stores a checksum of every tensor, torch.load checks none.

    Raises BadZipFile if it is cut off, or no checkpoint at all, and ValueError if bytes have changed.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if (changed := archive.testzip()) is not None:
            raise ValueError(f"the bytes of {changed} have changed since they were written")
    return content


def _compared(settings: Training, processes: int) -> dict[str, Any]:
    return {**settings.model_dump(mode="json", exclude=_FREE), "processes": processes}


def _changes(known: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> list[str]:
    changes = []
    for name in sorted(known.keys() | now.keys()):
        before, after = known.get(name), now.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            changes += _changes(before, after, f"{where}{name}.")
        elif before != after:
            changes.append(f"{where}{name} was {_short(before)} and is {_short(after)} now")
    return changes


def _short(value: Any) -> str:
    text = "not set" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all values are finite."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
