"""Several LoRA files as one concept: merged in memory, for a model that is open."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lora_compose.attention.lora_bank import LoraFactors
from lora_compose.pipelines.concepts.loading import Factors
from lora_compose.pipelines.formats.files import LoraError, LoraFile
from lora_compose.pipelines.formats.keys import Part
from lora_compose.pipelines.formats.models import TEXT_ENCODERS, model_part
from lora_compose.pipelines.formats.rank_schedule import ALL_RANKS
from lora_compose.pipelines.merging import make_merger
from lora_compose.pipelines.merging.calibration import calibrate, prompt_of
from lora_compose.pipelines.merging.changes import Name, begin, check_number, side_by_side
from lora_compose.pipelines.merging.expressed import expressed
from lora_compose.pipelines.merging.factors import matrices
from lora_compose.pipelines.merging.merger import Merger

DEFAULT = "cat"
"""The exact sum, as for `lora-compose merge`."""


def merger_for(method: str | None, number: int) -> Merger:
    """The merger of a concept with several files. Raises ValueError if there is none, or not for so many files."""
    merger = make_merger(method or DEFAULT)
    check_number(merger, method or DEFAULT, number)
    return merger


def merge_matched(
    pipe: Callable[..., Any],
    files: Sequence[LoraFile],
    matched: Sequence[Factors],
    weights: Sequence[float],
    merger: Merger,
) -> Factors:
    """Merges files that were matched with the layers of a pipeline, which is left as it was found.

    Mergers that need a model's inputs make an image with each file alone, in this pipeline (`calibrate`). Raises
    LoraError if nothing is left of the files, and ValueError if the merger needs a trigger that a file lacks.
    """
    loras, notes = [], []
    for file, factors in zip(files, matched, strict=True):
        lora, note = expressed(pipe, _by_name(factors), file.path.name)
        loras.append(lora)
        notes += [] if note is None else [f"{file.path.name}: {note}"]
    changes = side_by_side(loras, weights, [file.path.name for file in files])
    moments = {}
    if merger.needs_model and any(weights):
        moments = calibrate(pipe, changes, [prompt_of(file) for file in files], merger)
    merge = begin(merger, list(changes.values()), weights)
    parts: dict[Part, dict[str, LoraFactors]] = {}
    for (part, layer), each in changes.items():
        merged = merge(each, moments.get((part, layer)))
        if merged.rank:
            parts.setdefault(part, {})[layer] = _shaped(merged, _original((part, layer), loras))
    if not parts:
        raise LoraError(f"nothing is left of {', '.join(file.path.name for file in files)}: every merged layer is zero")
    model = model_part(pipe)
    return Factors(
        parts.get(model, {}),
        {part: parts[part] for part in TEXT_ENCODERS if part in parts},
        tuple(key for factors in matched for key in factors.unmatched),
        (*_notes(files, matched), *notes),
        part=model,
    )


def without_tensors(file: LoraFile) -> LoraFile:
    """A file whose tensors are no longer needed."""
    return replace(file, tensors={}, embeddings={})


def _by_name(factors: Factors) -> dict[Name, LoraFactors]:
    return {(part, layer): f for part, lora in factors.by_part.items() for layer, f in lora.items()}


def _original(name: Name, loras: Sequence[Mapping[Name, LoraFactors]]) -> LoraFactors:
    return next(lora[name] for lora in loras if name in lora)


def _shaped(merged: LoraFactors, like: LoraFactors) -> LoraFactors:
    """Factors in fp32, in the shapes that a layer needs."""
    up, down = (side.float() for side in matrices(merged))
    return LoraFactors(down.reshape(-1, *like.down.shape[1:]), up.reshape(*up.shape, *like.up.shape[2:]))


def _notes(files: Sequence[LoraFile], matched: Sequence[Factors]) -> list[str]:
    notes = [
        f"{file.path.name}: {note}" for file, factors in zip(files, matched, strict=True) for note in factors.notes
    ]
    for file, factors in zip(files, matched, strict=True):
        if factors.ranks is not None:
            notes.append(f"{file.path.name}: it is {ALL_RANKS}")
        if factors.embeddings:
            words = ", ".join(factors.embeddings)
            notes.append(f"{file.path.name}: its words are left out ({words}); merging is about weights alone")
    return notes
