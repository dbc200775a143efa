"""How much LoRAs that act together change a model, beside what each was trained at.

The joint change of a layer, sum_i w_i D_i, is compared with the largest of the D_i alone, in the Frobenius norm. It
comes from products of all stacked factors, or of the change itself where that is smaller, so that its cost grows
linearly with the number of LoRAs. Two unrelated LoRAs at weight 1 give sqrt(2); what they have in
common adds up. Changes that depend on the model's weights (DoRA, OFT) are not counted.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lora_compose.attention.bank_cache import Handle
from lora_compose.attention.device import has_plain_weight, uncompiled
from lora_compose.attention.lora_bank import LoraFactors, base_layer
from lora_compose.pipelines.concepts.concept_set import LoadedConcept
from lora_compose.pipelines.formats.change import inner
from lora_compose.pipelines.scene.strength import WeightSchedule

WARNED = 1.5
"""The joint change above which there is a warning; two unrelated LoRAs at their full weights have 1.41.

Measured on the playground's transformer (`docs/methods/merge.md`): the largest at which nothing was clearly lost.
"""
_MOST = 256  # LoRAs whose norms are kept, and sets of them

_norms: OrderedDict[Handle, Mapping[str, float]] = OrderedDict()
_joint: "OrderedDict[tuple[tuple[Handle, float], ...], Joint]" = OrderedDict()


@dataclass(frozen=True)
class Joint:
    """The joint change of some LoRAs.

    Attributes:
        weights: The largest weight of each during the call.
        by_layer: By layer, the joint change and the largest change of one alone at weight 1.
        ratio: The same of all layers together, as a ratio.
    """

    weights: tuple[float, ...]
    by_layer: Mapping[str, tuple[float, float]]
    ratio: float

    def scales(self, limit: float) -> dict[str, float]:
        """By layer, the factor that takes the joint change down to a multiple of the largest alone, if it is more."""
        return {name: limit * alone / joint for name, (joint, alone) in self.by_layer.items() if joint > limit * alone}

    def share_of(self, model: nn.Module) -> float | None:
        """The joint change relative to the weights of the layers; None if these cannot be read as they are."""
        weights = 0.0
        for name in self.by_layer:
            layer = base_layer(uncompiled(model).get_submodule(name))
            weight = layer._parameters.get("weight")
            if weight is None or weight.is_meta or not has_plain_weight(layer, weight):
                return None
            weights += float(torch.linalg.vector_norm(weight.detach(), dtype=torch.float32)) ** 2
        joint = sum(joint**2 for joint, _ in self.by_layer.values())
        return math.sqrt(joint / weights) if weights else None


def joint_change(loaded: Sequence[LoadedConcept]) -> Joint | None:
    """The joint change of concepts that act on the same positions; None if fewer than two LoRAs do, or one is no file.

    Of concepts with one LoRA the strongest counts, as in the bank. What was computed once is kept for the next call.
    """
    strongest: dict[Handle, tuple[LoadedConcept, float]] = {}
    for concept in loaded:
        weight = max(_weights(concept), key=abs)
        handle = concept.handle(concept.factors.part)
        if handle not in strongest or abs(weight) > abs(strongest[handle][1]):
            strongest[handle] = concept, weight
    # A call may be checked with LoRAs that have shapes alone. Adapters of PEFT may change between calls.
    acting = [(concept, weight) for concept, weight in strongest.values() if weight and _has_values(concept)]
    if len(acting) < 2 or not all(concept.files for concept, _ in acting):
        return None
    key = tuple((concept.handle(concept.factors.part), weight) for concept, weight in acting)
    if key not in _joint:
        _joint[key] = _joint_change(acting)
        while len(_joint) > _MOST:
            _joint.popitem(last=False)
    return _joint[key]


def _joint_change(acting: Sequence[tuple[LoadedConcept, float]]) -> Joint:
    weights = tuple(weight for _, weight in acting)
    norms = [_norms_of(concept) for concept, _ in acting]
    by_layer: dict[str, list[tuple[LoraFactors, float]]] = {}
    for (concept, weight), known in zip(acting, norms, strict=True):
        lora = concept.lora
        for name in known:
            by_layer.setdefault(name, []).append((lora[name], weight))
    joint = {
        name: (_norm(parts), math.sqrt(max(known.get(name, 0.0) for known in norms)))
        for name, parts in by_layer.items()
    }
    largest = max(sum(known.values()) for known in norms)
    whole = sum(together**2 for together, _ in joint.values())
    return Joint(weights, joint, math.sqrt(whole / largest) if largest else 0.0)


def _norm(parts: Sequence[tuple[LoraFactors, float]]) -> float:
    """The Frobenius norm of a weighted sum of changes: |B A|^2 = sum((B^T B) * (A A^T)), for all factors stacked."""
    if any(factors.left is not None for factors, _ in parts):
        return float(torch.linalg.vector_norm(sum(weight * factors.delta().double() for factors, weight in parts)))
    ups = torch.cat([weight * factors.scale * factors.up.flatten(1).double() for factors, weight in parts], dim=1)
    downs = torch.cat([factors.down.flatten(1).double() for factors, _ in parts])
    outputs, rank, inputs = *ups.shape, downs.shape[1]
    if rank * (outputs + inputs) > outputs * inputs:
        return float(torch.linalg.vector_norm(ups @ downs))
    return math.sqrt(max(0.0, float(((ups.T @ ups) * (downs @ downs.T)).sum())))


def warning(loaded: Sequence[LoadedConcept], joint: Joint, model: nn.Module) -> str:
    """Figures and a proposal for LoRAs that change more together than each was trained to."""
    names = ", ".join(concept.concept.name for concept in loaded)
    lower = ", ".join(f"{weight / joint.ratio:.2g}" for weight in joint.weights)
    share = joint.share_of(model)
    weights = "" if share is None else f", {share:.1%} of the weights that they change"
    return (
        f"{names} act on the same places: together their change is {joint.ratio:.2g} times the larger one as it was "
        f"trained{weights}. If the image breaks, use weights such as {lower}, or Merge(limit=1), or keep "
        "them apart: method='regional' with a region for each"
    )


def _has_values(loaded: LoadedConcept) -> bool:
    return bool(loaded.factors.model) and not any(factors.down.is_meta for factors in loaded.factors.model.values())


def _weights(loaded: LoadedConcept) -> list[float]:
    weight = loaded.concept.weight
    return [point.weight for point in WeightSchedule.of(0.0 if weight is None else weight).points]


def _norms_of(loaded: LoadedConcept) -> Mapping[str, float]:
    """The squared norm of each layer's change that does not depend on the model's weights, kept for the next call."""
    key = loaded.handle(loaded.factors.part)
    if key in _norms:
        _norms.move_to_end(key)
        return _norms[key]
    norms = {name: inner(part, part) for name, part in loaded.lora.items() if part.transform is None}
    _norms[key] = norms
    while len(_norms) > _MOST:
        _norms.popitem(last=False)
    return norms
