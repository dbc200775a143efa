"""Matches the layers of LoRA files with each other, so that they can be merged."""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_compose.attention import LoraFactors
from lora_compose.compose.benchmark.architectures import FAMILIES, without_weights
from lora_compose.compose.lora.merging import Given, Matched
from lora_compose.pipelines.concepts.loading import match
from lora_compose.pipelines.formats.alphas import needed_alpha
from lora_compose.pipelines.formats.by_name import by_name
from lora_compose.pipelines.formats.files import LoraError, LoraFile
from lora_compose.pipelines.formats.keys import PARTS, parse
from lora_compose.pipelines.formats.lora_writer import FileLayer, Spelling, stems
from lora_compose.pipelines.formats.models import model_part
from lora_compose.pipelines.formats.rank_schedule import ALL_RANKS, is_tlora
from lora_compose.pipelines.formats.recognise import guess_family
from lora_compose.pipelines.merging.changes import Name, side_by_side
from lora_compose.pipelines.merging.expressed import expressed


def match_files(
    given: Sequence[Given], pipe: Any = None, *, spelling: Spelling | None = None, alpha: float | None = None
) -> Matched:
    """Matches the layers of files with each other.

    Args:
        pipe: The model that they are for. Without one, the full architecture of their family gives the layer names;
            files of an unknown family are matched by their own names.
        spelling: Spelling of the result's keys; by default that of the first file, and diffusers' for a transformer.

    Raises:
        LoraError: If files are damaged, not supported, for different models, or do not fit the model.
        ValueError: If the layer names have no such spelling.
    """
    pipe = pipe or _family(given)
    if pipe is None:
        return _match_by_name(given, spelling, alpha)
    if spelling is None:
        spelling = _spelling(given[0].file) if model_part(pipe) == "unet" else "diffusers"
    loras: list[Mapping[Name, LoraFactors]] = []
    notes: list[str] = []
    for given_lora in given:
        factors = match(given_lora.file, pipe, alpha=needed_alpha(alpha, given_lora.file))
        parts = factors.by_part
        named: dict[Name, LoraFactors] = {(part, name): f for part in PARTS for name, f in parts.get(part, {}).items()}
        lora, note = expressed(pipe, named, given_lora.source)
        loras.append(lora)
        notes += [] if note is None else [f"{given_lora.source}: {note}"]
        if factors.unmatched:
            keys = ", ".join(factors.unmatched[:3])
            notes.append(f"{given_lora.source}: {len(factors.unmatched)} keys fit no layer and are left out: {keys}")
        notes += [f"{given_lora.source}: {note}" for note in factors.notes]
        notes += [] if factors.ranks is None else [f"{given_lora.source}: it is {ALL_RANKS}"]
        if factors.embeddings:
            words = ", ".join(factors.embeddings)
            notes.append(f"{given_lora.source}: its words are left out ({words}); the result changes weights alone")
    names = dict.fromkeys(name for lora in loras for name in lora)
    called = stems(spelling, pipe, {part: [name for p, name in names if p == part] for part in PARTS})
    kernels = {name: tuple(factors.down.shape[2:]) for lora in reversed(loras) for name, factors in lora.items()}
    file_layers = {name: FileLayer(called[name], kernels[name]) for name in names}
    changes = side_by_side(
        loras, [given_lora.weight for given_lora in given], [given_lora.source for given_lora in given]
    )
    return Matched(given, changes, file_layers, spelling, tuple(notes))


def _family(given: Sequence[Given]) -> Any:
    """Names and shapes of the model family of the files; None if it is unknown."""
    families = {}
    for given_lora in given:
        shapes = {key: tensor.shape for key, tensor in given_lora.file.tensors.items()}
        families[given_lora.source] = guess_family(shapes, given_lora.file.metadata).family
    if len(set(families.values())) > 1:
        listed = "; ".join(f"{source} is for {family or 'an unknown family'}" for source, family in families.items())
        raise LoraError(f"only LoRAs for the same model are merged: {listed}; give --model if you know better")
    (family,) = set(families.values())
    return without_weights(family) if family in FAMILIES else None


def _match_by_name(given: Sequence[Given], spelling: Spelling | None, alpha: float | None) -> Matched:
    own = _spelling(given[0].file)
    if spelling not in (None, own):
        raise ValueError(
            f"{given[0].source} is for an unknown model, so its layers keep their names; "
            "leave --keys out, or give --model"
        )
    contents = [by_name(given_lora.file, alpha=needed_alpha(alpha, given_lora.file)) for given_lora in given]
    named = [dict(layers) for layers, _ in contents]
    for given_lora, layers in zip(given[1:], named[1:], strict=True):
        if not layers.keys() & named[0].keys():
            raise LoraError(
                f"{given_lora.source} and {given[0].source} have no layer in common, as they name them: "
                f"{next(iter(layers.values())).stem} and {next(iter(named[0].values())).stem}; expected files for the "
                "same model from the same kind of trainer"
            )
    file_layers: dict[Name, FileLayer] = {}
    for layers in named:
        for name, layer in layers.items():
            file_layers.setdefault(name, FileLayer(layer.stem, tuple(layer.factors.down.shape[2:])))
    loras = [{name: layer.factors for name, layer in layers.items()} for layers in named]
    notes = [
        f"{given_lora.source}: {len(left)} keys are left out: {', '.join(left[:3])}"
        for given_lora, (_, left) in zip(given, contents, strict=True)
        if left
    ]
    notes += [
        f"{given_lora.source}: it is {ALL_RANKS}"
        for given_lora in given
        if is_tlora(given_lora.file.metadata, given_lora.file.tensors)
    ]
    notes.append("the model is unknown: layers were matched by their names in the files")
    changes = side_by_side(
        loras, [given_lora.weight for given_lora in given], [given_lora.source for given_lora in given]
    )
    return Matched(given, changes, file_layers, own, tuple(notes))


def _spelling(file: LoraFile) -> Spelling:
    """The spelling of a file's keys, of the two that are written."""
    for key in map(parse, file.tensors):
        if key is not None and key.kind is not None:
            sides = (".lora_down", ".lora_up")
            return "kohya" if key.prefix.endswith("_") or key.suffix.startswith(sides) else "diffusers"
    return "diffusers"
