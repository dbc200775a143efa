"""Inspects a LoRA file: format, base model, ranks, norms, and which of its layers fit a model."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from lora_compose.attention import LoraFactors
from lora_compose.attention.device import uncompiled
from lora_compose.attention.lora_bank import base_layer
from lora_compose.attention.transforms import dense_weight
from lora_compose.compose.benchmark.architectures import FAMILIES, without_weights
from lora_compose.pipelines.concepts.loading import Factors, LoraError, assign, match
from lora_compose.pipelines.formats.alphas import Alphas
from lora_compose.pipelines.formats.change import MAX_RANK, inner
from lora_compose.pipelines.formats.files import LoraFile
from lora_compose.pipelines.formats.kinds import rank_of
from lora_compose.pipelines.formats.layers import Layer, by_layer
from lora_compose.pipelines.formats.recognise import form, guess_family
from lora_compose.pipelines.formats.triggers import parsed

# Metadata of trainers, and our labels for them.
_FACTS = {
    "modelspec.title": "title",
    "modelspec.author": "author",
    "modelspec.license": "licence",
    "modelspec.usage_hint": "usage",
    "modelspec.date": "date",
    "method": "trained with",
    "ss_sd_model_name": "trained on",
    "ss_network_module": "network",
    "ss_network_dim": "rank, in the metadata",
    "ss_network_alpha": "alpha, in the metadata",
    "ss_network_args": "network settings",
    "ss_num_train_images": "images",
    "ss_resolution": "resolution",
    "ss_steps": "steps",
    "ss_max_train_steps": "steps planned",
    "ss_epoch": "epoch",
    "ss_learning_rate": "learning rate",
    "ss_unet_lr": "learning rate of the UNet",
    "ss_text_encoder_lr": "learning rate of the text encoder",
    "ss_optimizer": "optimizer",
    "ss_clip_skip": "clip skip",
    "ss_training_comment": "comment",
}
_MANY = 200  # the most characters of a fact, and the most merged files, that are shown

RECORD = "lora_compose.merge"
"""The metadata key of the record of a merge: sources and settings, as JSON."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class Block(_Frozen):
    """A file's changes of one block of a model.

    Attributes:
        part: "unet", "text_encoder" or "text_encoder_2".
        name: Such as "down_blocks.1"; "layers" for all of a text encoder.
        alphas: Alphas of the changes; empty if the file has none.
        norm: Frobenius norm of the change, as it is applied; None if it was matched with no model, or depends on
            weights that are not there.
    """

    part: str
    name: str
    layers: int
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    norm: float | None


class Inspection(_Frozen):
    """The result of inspecting one file.

    Attributes:
        size: In bytes.
        form: The kind of adapter, and the tool whose key names it has.
        family: Model family: "SD 1.x", "SD 2.x", "SDXL", another name, or None.
        why: The evidence for the family.
        triggers: Words that may be the trigger, each with where they were found.
        notes: What is cut, left out or guessed.
    """

    file: str
    sha256: str
    size: int
    form: str
    family: str | None
    why: tuple[str, ...]
    matched_with: str | None
    triggers: tuple[tuple[str, str], ...]
    facts: tuple[tuple[str, str], ...]
    blocks: tuple[Block, ...] = ()
    matched: int = 0
    unmatched: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    problem: str | None = None


class Overlap(_Frozen):
    """How much the changes of two files have in common.

    Attributes:
        blocks: By part and block, <A, B>^2 / (|A|^2 |B|^2), Frobenius, over the layers that both change; 0 to 1.
        whole: The overlap over all layers; None if they change no layer in common.
    """

    files: tuple[str, str]
    blocks: tuple[tuple[str, float], ...]
    whole: float | None
    meaning: str


def inspect(
    file: LoraFile, pipe: Any = None, model: str = "", *, alpha: float | None = None, max_rank: int = MAX_RANK
) -> tuple[Inspection, Factors | None]:
    """Inspects a file, and matches it with a model.

    Without a model, a mismatch is not a problem: layers that the family does not have are listed under their names in
    the file.

    Args:
        pipe: The model; by default that of the file's family, at full size and without weights, if there is one.
    """
    shapes = {key: tensor.shape for key, tensor in file.tensors.items()}
    guess = guess_family(shapes, file.metadata)
    family, why = guess.family, guess.why
    if pipe is None and family is None:
        family = _fitting(file, alpha)
        why = why if family is None else (*why, f"but all its layers fit {family}")
    known = Inspection(
        file=str(file.path), sha256=file.sha256, size=file.path.stat().st_size if file.path.is_file() else 0,
        form=form([*file.tensors]), family=family, why=why, matched_with=None,
        triggers=tuple(_triggers(file)), facts=(*merge_facts(file.metadata), *_facts(file.metadata)),
    )  # fmt: skip
    alone = pipe is None
    if alone and family in FAMILIES:
        pipe, model = without_weights(family), family
    if pipe is None:
        return _unmatched(known, file), None
    try:
        factors = match(file, pipe, alpha=alpha, max_rank=max_rank)
    except LoraError as error:
        if alone:  # no model was named
            return _unmatched(known, file, str(error).replace("this model", f"{family} at full size")), None
        return known.model_copy(update={"matched_with": model, "problem": str(error)}), None
    grouped = by_layer(file)
    layers, unmatched = assign(file, grouped, pipe)
    found = {
        "matched_with": model,
        "blocks": tuple(_blocks(file, layers, factors, pipe)),
        "matched": len(file.tensors) - len(unmatched) - len(grouped.inexpressible),
        "unmatched": unmatched,
        "notes": (*factors.notes, *_about_weights(factors)),
    }
    return known.model_copy(update=found), factors


def _about_weights(factors: Factors) -> Iterator[str]:
    if count := sum(one.transform is not None for lora in factors.by_part.values() for one in lora.values()):
        yield (
            f"{count} layers rescale or rotate the model's own weights: their norms are shown with a model's weights "
            "only (--model), and they take no part in overlaps"
        )


def _unmatched(known: Inspection, file: LoraFile, why: str | None = None) -> Inspection:
    """The changes of a file by its own keys alone; `why` says why it was not matched with its family's layers."""
    try:
        grouped = by_layer(file)
        own = Alphas(file).own
        blocks: dict[tuple[str, str], list[Layer]] = {}
        for layer in grouped.layers:
            blocks.setdefault((layer.part, _block_in_file(layer.module)), []).append(layer)
        found = tuple(_block_of_file(part, name, inside, own) for (part, name), inside in blocks.items())
    except (LoraError, ValueError) as error:
        return known.model_copy(update={"problem": str(error)})
    refused = next((layer.refused for layer in grouped.layers if layer.refused), None)
    about = {"problem": f"it is {refused}"} if refused else {"notes": () if why is None else (why,)}
    return known.model_copy(update={"blocks": found, "unmatched": grouped.unknown, **about})


def _block_of_file(part: str, name: str, layers: Sequence[Layer], own: Callable[[str, Layer], float | None]) -> Block:
    ranks = {rank for layer in layers if (rank := rank_of(layer.shapes)) is not None}
    alphas = {alpha for layer in layers if (alpha := own(layer.module, layer)) is not None}
    return Block(
        part=part, name=name, layers=len(layers), ranks=tuple(sorted(ranks)), alphas=tuple(sorted(alphas)), norm=None
    )  # fmt: skip


def _block_in_file(module: str) -> str:
    """The block of a layer by the name that the file has for it: "double_blocks", "down_blocks_1", "mid_block"."""
    found = re.match(r"(?:input|output|down|up)_blocks_\d+|[a-z_]*?(?:blocks?|layers)(?=_|$)", module)
    return found[0] if found else module


def _fitting(file: LoraFile, alpha: float | None) -> str | None:
    """The only family whose layers a whole file fits; None if there are none, or several."""
    found = []
    for family in FAMILIES:
        try:
            factors = match(file, without_weights(family), alpha=alpha, max_rank=1)
        except LoraError:
            continue
        found += [family] * (not factors.unmatched)
    return found[0] if len(found) == 1 else None


def _triggers(file: LoraFile) -> Iterator[tuple[str, str]]:
    for found in file.words.triggers:
        by_part = file.embeddings.get(found.words, {})
        vectors = " and ".join(f"{len(tensor.flatten(0, 1))} for {part}" for part, tensor in by_part.items())
        yield found.words, f"{found.where}: {vectors}" if vectors else found.where


def merge_facts(metadata: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Method and inputs from the metadata of a file that `lora-compose merge` wrote.

    The metadata are not trusted.
    """
    record = parsed(metadata.get(RECORD))
    files = record.get("files")
    if not isinstance(files, list):
        return
    settings = record.get("settings")
    words = [f"{name}={value}" for name, value in settings.items()] if isinstance(settings, dict) else []
    words += [f"rank {record['rank']}"] if record.get("rank") is not None else []
    yield "merged by", _short(" ".join([str(record.get("method")), f"({', '.join(words)})" if words else ""]).strip())
    for one in files[:_MANY]:
        if isinstance(one, dict):
            weight, sha256 = one.get("weight"), str(one.get("sha256"))
            yield "merged from", _short(f"{one.get('name')}, weight {weight}, SHA-256 {sha256[:12]}")


def _facts(metadata: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for key, label in _FACTS.items():
        value = (metadata.get(key) or "").strip()
        if value and value not in ("None", "{}"):
            yield label, _short(value)


def _short(text: str) -> str:
    return text if len(text) <= _MANY else f"{text[:_MANY]} ..."


def block_of(part: str, layer: str) -> str:
    """The block of a layer: "unet.down_blocks.1", "unet.mid_block"; a text encoder is one block."""
    if part != "unet":
        return f"{part}.layers"
    found = re.match(r"\w+_blocks\.\d+|[^.]+", layer)
    return f"{part}.{found[0] if found else layer}"


def _blocks(file: LoraFile, layers: Mapping[Any, Mapping[str, Layer]], factors: Factors, pipe: Any) -> Iterator[Block]:
    loras = factors.by_part
    own = Alphas(file).own
    for part, names in layers.items():
        blocks: dict[str, list[str]] = {}
        for name in names:
            blocks.setdefault(block_of(part, name), []).append(name)
        for block in sorted(blocks, key=_order):
            inside = [names[name] for name in blocks[block]]
            each = [_energy(getattr(pipe, part), name, loras[part][name]) for name in blocks[block]]
            energy = None if None in each else sum(filter(None, each))
            ranks = {rank for layer in inside if (rank := rank_of(layer.shapes)) is not None}
            alphas = {alpha for name in blocks[block] if (alpha := own(name, names[name])) is not None}
            yield Block(
                part=part, name=block.removeprefix(f"{part}."), layers=len(inside), ranks=tuple(sorted(ranks)),
                alphas=tuple(sorted(alphas)),
                norm=None if energy is None else math.sqrt(max(0.0, energy)),
            )  # fmt: skip


def _energy(model: nn.Module, name: str, factors: LoraFactors) -> float | None:
    """The squared Frobenius norm of a change; None if it depends on a weight that is not there."""
    if factors.transform is None:
        return inner(factors, factors)
    layer = base_layer(uncompiled(model).get_submodule(name))
    if layer.get_parameter("weight").is_meta:
        return None
    return float(factors.change_of(dense_weight(layer, torch.device("cpu"), torch.float32)).double().square().sum())


def _order(block: str) -> tuple[int, str, int]:
    """The order in which a model runs its blocks."""
    name = block.partition(".")[2]
    stage = next(
        (i for i, start in enumerate(("conv_in", "time", "add", "down", "mid", "up")) if name.startswith(start)), 9
    )
    number = name.rpartition(".")[2]
    return stage, name.rpartition(".")[0], int(number) if number.isdigit() else 0


def overlaps(files: Sequence[tuple[str, Factors]]) -> list[Overlap]:
    """How much the changes of files, matched with the same model, have in common, pair by pair."""
    return [_overlap(one, other) for one, other in combinations(files, 2)]


def _overlap(one: tuple[str, Factors], other: tuple[str, Factors]) -> Overlap:
    (name, mine), (other_name, theirs) = one, other
    layers, others = _layers(mine), _layers(theirs)
    sums: dict[str, list[float]] = {}
    for key in layers.keys() & others.keys():
        a, b = layers[key], others[key]
        found = inner(a, b), inner(a, a), inner(b, b)
        block = sums.setdefault(block_of(*key), [0.0, 0.0, 0.0])
        block[:] = [x + y for x, y in zip(block, found, strict=True)]
    blocks = tuple(
        (block, _share(*sums[block])) for block in sorted(sums, key=lambda block: (block[0] != "u", _order(block)))
    )
    whole = _share(*(sum(column) for column in zip(*sums.values(), strict=True))) if sums else None
    return Overlap(files=(name, other_name), blocks=blocks, whole=whole, meaning=_meaning(whole))


def _layers(factors: Factors) -> dict[tuple[str, str], LoraFactors]:
    loras = factors.by_part
    return {
        (part, name): found for part, lora in loras.items() for name, found in lora.items() if found.transform is None
    }


def _share(product: float, one: float, other: float) -> float:
    return min(1.0, product**2 / (one * other)) if one > 0 and other > 0 else 0.0


def _meaning(whole: float | None) -> str:
    if whole is None:
        return "they change no layer in common, so neither disturbs the other's weights"
    if whole < 0.01:
        return "their changes point in unrelated directions: they mix only where both act"
    if whole < 0.1:
        return "they have little in common: summed, a small part acts twice"
    if whole < 0.25:
        return "they share a direction, as LoRAs of one style or class do: summed, that part acts twice"
    return (
        "they are largely the same change, as versions of one LoRA are: together they act like one of a larger weight"
    )
