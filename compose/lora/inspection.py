"""Matches a LoRA file with a model: ranks, norms, and which of its layers fit; and how much files have in common."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from pydantic import BaseModel
from torch import nn

from lora_compose.attention import LoraFactors
from lora_compose.attention.column_norms import with_column_norms
from lora_compose.attention.device import modules_of, uncompiled
from lora_compose.attention.lora_bank import Lora, base_layer
from lora_compose.attention.transforms import dense_weight
from lora_compose.compose.benchmark.architectures import FAMILIES, without_weights
from lora_compose.compose.lora.file_inspection import Block, Inspection, about, block, block_of, by_itself
from lora_compose.compose.lora.merging import overlap
from lora_compose.pipelines.concepts.loading import Factors, LoraError, assign, match
from lora_compose.pipelines.formats.alphas import Alphas
from lora_compose.pipelines.formats.change import MAX_RANK, inner
from lora_compose.pipelines.formats.files import LoraFile
from lora_compose.pipelines.formats.layers import Layer, by_layer


class Overlap(BaseModel, frozen=True):
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
    known, alone = about(file), pipe is None
    if alone and known.family is None and (fitting := _fitting(file, alpha)) is not None:
        why = (*known.why, f"but all its layers fit {fitting}")
        known = known.model_copy(update={"family": fitting, "why": why})
    family = known.family
    if alone and family in FAMILIES:
        pipe, model = without_weights(family), family
    if pipe is None:
        return by_itself(known, file), None
    try:
        factors = match(file, pipe, alpha=alpha, max_rank=max_rank)
    except LoraError as error:
        if alone:  # no model was named
            return by_itself(known, file, str(error).replace("this model", f"{family} at full size")), None
        return known.model_copy(update={"matched_with": model, "problem": str(error)}), None
    grouped = by_layer(file)
    layers, _ = assign(file, grouped, pipe)
    fitted = {
        "matched_with": model,
        "blocks": tuple(_blocks(file, layers, factors, pipe)),
        "matched": len(file.tensors) - len(factors.unmatched) - len(grouped.inexpressible),
        "unmatched": factors.unmatched,
        "notes": (*factors.notes, *_about_weights(factors)),
    }
    return known.model_copy(update=fitted), factors


def _about_weights(factors: Factors) -> Iterator[str]:
    if count := sum(change.transform is not None for lora in factors.by_part.values() for change in lora.values()):
        yield (
            f"{count} layers rescale or rotate the model's own weights: their norms are shown with a model's weights "
            "only (--model), and they take no part in overlaps"
        )


def _fitting(file: LoraFile, alpha: float | None) -> str | None:
    """The only family whose layers a whole file fits; None if there are none, or several."""
    families = []
    for family in FAMILIES:
        try:
            factors = match(file, without_weights(family), alpha=alpha, max_rank=1)
        except LoraError:
            continue
        families += [family] * (not factors.unmatched)
    return families[0] if len(families) == 1 else None


def _blocks(file: LoraFile, layers: Mapping[Any, Mapping[str, Layer]], factors: Factors, pipe: Any) -> Iterator[Block]:
    loras = {part: _with_column_norms(getattr(pipe, part), lora) for part, lora in factors.by_part.items()}
    own = Alphas(file).own
    for part, names in layers.items():
        blocks: dict[str, list[str]] = {}
        for name in (name for name in names if name in loras[part]):
            blocks.setdefault(block_of(part, name), []).append(name)
        for key in sorted(blocks, key=_order):
            inside = [names[name] for name in blocks[key]]
            each = [_energy(getattr(pipe, part), name, loras[part][name]) for name in blocks[key]]
            energy = None if None in each else sum(filter(None, each))
            norm = None if energy is None else math.sqrt(max(0.0, energy))
            alphas = [own(name, names[name]) for name in blocks[key]]
            yield block(part, key.removeprefix(f"{part}."), inside, alphas, norm)


def _with_column_norms(model: nn.Module, lora: Lora) -> Lora:
    """A LoRA with the norms that layers of a model have together, if its weights are there."""
    if next(model.parameters()).is_meta:
        return lora
    return with_column_norms(lora, modules_of(model), torch.device("cpu"), torch.float32)


def _energy(model: nn.Module, name: str, factors: LoraFactors) -> float | None:
    """The squared Frobenius norm of a change; None if it depends on a weight that is not there."""
    if factors.transform is None:
        return inner(factors, factors)
    layer = base_layer(uncompiled(model).get_submodule(name))
    if layer.get_parameter("weight").is_meta:
        return None
    return float(factors.change_of(dense_weight(layer, torch.device("cpu"), torch.float32)).double().square().sum())


def _order(key: str) -> tuple[int, str, int]:
    """The order in which a model runs its blocks."""
    name = key.partition(".")[2]
    stage = next(
        (i for i, start in enumerate(("conv_in", "time", "add", "down", "mid", "up")) if name.startswith(start)), 9
    )
    number = name.rpartition(".")[2]
    return stage, name.rpartition(".")[0], int(number) if number.isdigit() else 0


def overlaps(files: Sequence[tuple[str, Factors]]) -> list[Overlap]:
    """How much the changes of files, matched with the same model, have in common, pair by pair."""
    return [_overlap(first, second) for first, second in combinations(files, 2)]


def _overlap(first: tuple[str, Factors], second: tuple[str, Factors]) -> Overlap:
    (name, mine), (other_name, theirs) = first, second
    layers, others = _layers(mine), _layers(theirs)
    sums: dict[str, list[float]] = {}
    for layer in layers.keys() & others.keys():
        a, b = layers[layer], others[layer]
        products = inner(a, b), inner(a, a), inner(b, b)
        total = sums.setdefault(block_of(*layer), [0.0, 0.0, 0.0])
        total[:] = [x + y for x, y in zip(total, products, strict=True)]
    in_order = sorted(sums, key=lambda key: (key[0] != "u", _order(key)))
    blocks = tuple((key, overlap(*sums[key])) for key in in_order)
    whole = overlap(*(sum(column) for column in zip(*sums.values(), strict=True))) if sums else None
    return Overlap(files=(name, other_name), blocks=blocks, whole=whole, meaning=_meaning(whole))


def _layers(factors: Factors) -> dict[tuple[str, str], LoraFactors]:
    loras = factors.by_part
    return {
        (part, name): change
        for part, lora in loras.items()
        for name, change in lora.items()
        if change.transform is None
    }


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
