"""How much LoRAs that act together change a model, beside what each was trained at.

The joint change of a layer, sum_i w_i D_i, is compared with the largest of the D_i alone, in the Frobenius norm, from
inner products of factors (`inner`): no change is built. Two unrelated LoRAs at weight 1 give sqrt(2); what they have in
common adds up. Changes that depend on the model's weights (DoRA, OFT) are not counted.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_compose.attention.bank_cache import Handle
from lora_compose.attention.device import has_plain_weight, uncompiled
from lora_compose.attention.lora_bank import base_layer
from lora_compose.pipelines.concepts.concept_set import LoadedConcept
from lora_compose.pipelines.formats.change import inner
from lora_compose.pipelines.scene.strength import WeightSchedule

WARNED = 1.5
"""The joint change from which there is a warning; two unrelated LoRAs at their full weights have 1.41."""
_MOST = 256  # pairs of LoRAs whose products are kept

Products = Mapping[str, float]
"""Inner products of two LoRAs by layer."""

_known: OrderedDict[tuple[Handle, Handle], Products] = OrderedDict()
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
    for one in loaded:
        weight = max(_weights(one), key=abs)
        handle = one.handle(one.factors.part)
        if handle not in strongest or abs(weight) > abs(strongest[handle][1]):
            strongest[handle] = one, weight
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
    weights, number = tuple(weight for _, weight in acting), len(acting)
    tables: dict[str, Tensor] = {}
    for i in range(number):
        for j in range(i + 1):
            for name, product in _products(acting[i][0], acting[j][0]).items():
                table = tables.setdefault(name, torch.zeros(number, number, dtype=torch.float64))
                table[i, j] = table[j, i] = product
    factors = torch.tensor(weights, dtype=torch.float64)
    joint = {
        name: (math.sqrt(max(0.0, float(factors @ table @ factors))), math.sqrt(float(table.diagonal().max())))
        for name, table in tables.items()
    }
    whole = sum(tables.values(), torch.zeros(number, number, dtype=torch.float64))
    largest = float(whole.diagonal().max())
    ratio = math.sqrt(max(0.0, float(factors @ whole @ factors)) / largest) if largest else 0.0
    return Joint(weights, joint, ratio)


def warning(loaded: Sequence[LoadedConcept], joint: Joint, model: nn.Module) -> str:
    """Figures and a proposal for LoRAs that change more together than each was trained to."""
    names = ", ".join(one.concept.name for one in loaded)
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


def _products(one: LoadedConcept, other: LoadedConcept) -> Products:
    """Inner products of two LoRAs, of files kept for the next call."""
    key = one.handle(one.factors.part), other.handle(other.factors.part)
    if key in _known:
        _known.move_to_end(key)
        return _known[key]
    first, second = one.lora, other.lora
    products = {
        name: inner(factors, second[name])
        for name, factors in first.items()
        if name in second and factors.transform is None and second[name].transform is None
    }
    _known[key] = products
    while len(_known) > _MOST:
        _known.popitem(last=False)
    return products
