"""How much LoRAs that act together change a model, beside what each was trained at.

The joint change of a layer, sum_i w_i D_i, is compared with the largest of the D_i alone, in the Frobenius norm. It
comes from products of all stacked factors, or of the change itself where that is smaller, so that its cost grows
linearly with the number of LoRAs. Two unrelated LoRAs at weight 1 give sqrt(2); what they have in
common adds up. Changes that depend on the model's weights (DoRA, OFT) are made from these, once for each set.
"""

import math
import threading
from collections import OrderedDict
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_compose.attention.bank_cache import Handle
from lora_compose.attention.column_norms import with_column_norms
from lora_compose.attention.device import dtype_of, has_plain_weight, modules_of, uncompiled
from lora_compose.attention.lora_bank import Lora, LoraFactors, base_layer
from lora_compose.attention.transforms import Rescaling, Version, dense_weight, version_of
from lora_compose.pipelines.concepts.concept_set import LoadedConcept
from lora_compose.pipelines.formats.change import inner
from lora_compose.pipelines.scene.strength import WeightSchedule

WARNED = 1.5
"""The joint change above which there is a warning; two unrelated LoRAs at their full weights have 1.41.

Measured on the playground's transformer (`docs/methods/merge.md`): the largest at which likeness is that of 1.
"""
FEW_STEPS = 10
"""The most steps of a call without guidance that is taken for one of a few-step model."""
WARNED_IN_FEW_STEPS, HELD_IN_FEW_STEPS = 0.5, 0.42
"""Joint changes in few steps: above the first there is a warning, the second is proposed.

From https://github.com/Haoming02/sd-webui-forge-classic/issues/534 (Z-Image-Turbo): two LoRAs at weight 0.5, so 0.71 if
they are unrelated, break the image, and hold at 0.3, so 0.42. The playground's transformer holds to 1.41 in four steps.
"""
_MOST = 256  # LoRAs whose norms are kept, and sets of them

_lock = threading.Lock()  # models of several threads share these
_norms: OrderedDict[Handle, Mapping[str, float]] = OrderedDict()
_joint: "OrderedDict[Hashable, tuple[Joint, Sequence[tuple[str, Version]]]]" = OrderedDict()


@dataclass(frozen=True)
class Joint:
    """The joint change of some LoRAs.

    Attributes:
        weights: The weight of each in the step in which they change most.
        by_layer: By layer, the largest joint change of any step and the largest change of one alone at weight 1.
        ratio: The same of all layers together, as a ratio.
        of_weights: Layers in which a change depends on the model's weights.
    """

    weights: tuple[float, ...]
    by_layer: Mapping[str, tuple[float, float]]
    ratio: float
    of_weights: frozenset[str] = frozenset()

    def scales(self, limit: float, layers: Collection[str] | None = None) -> dict[str, float]:
        """By layer, the factor that takes the joint change down to a multiple of the largest alone, if it is more.

        Layers with a change that depends on the model's weights have none: it is no multiple of its factors. Of the
        `layers` that are limited, None is all.
        """
        return {
            name: limit * alone / joint
            for name, (joint, alone) in self.by_layer.items()
            if name not in self.of_weights and (layers is None or name in layers) and joint > limit * alone
        }

    def within(self, limit: float) -> "Joint":
        """What a limit leaves of the joint change; layers whose change depends on the model's weights keep theirs."""
        scales = self.scales(limit)
        by_layer = {name: (joint * scales.get(name, 1.0), alone) for name, (joint, alone) in self.by_layer.items()}
        before, after = (sum(joint**2 for joint, _ in each.values()) for each in (self.by_layer, by_layer))
        return replace(self, by_layer=by_layer, ratio=self.ratio * math.sqrt(after / before) if before else 0.0)

    def share_of(self, model: nn.Module) -> float | None:
        """The joint change relative to the weights of the layers; None if these cannot be read as they are."""
        weights = 0.0
        for name in self.by_layer:
            layer = _layer(model, name)
            weight = layer._parameters.get("weight")
            if weight is None or weight.is_meta or not has_plain_weight(layer, weight):
                return None
            weights += float(torch.linalg.vector_norm(weight.detach(), dtype=torch.float32)) ** 2
        joint = sum(joint**2 for joint, _ in self.by_layer.values())
        return math.sqrt(joint / weights) if weights else None


def joint_change(loaded: Sequence[LoadedConcept], model: nn.Module | None = None, steps: int = 50) -> Joint | None:
    """The joint change of concepts that act on the same positions; None if no two act in one step, or one is no file.

    Of concepts with one LoRA the strongest counts, as in the bank. What was computed once is kept for the next call.

    Args:
        model: The model, for changes that depend on its weights; without it, or where these are not to be had, they
            are not counted.
        steps: Number of passes, for weights that change over them.
    """
    # A call may be checked with LoRAs that have shapes alone. Adapters of PEFT may change between calls.
    acting: dict[Handle, tuple[LoadedConcept, list[WeightSchedule]]] = {}
    for concept in loaded:
        weight = concept.concept.weight
        schedule = WeightSchedule.of(0.0 if weight is None else weight)
        if any(point.weight for point in schedule.points) and _has_values(concept):
            acting.setdefault(concept.handle(concept.factors.part), (concept, []))[1].append(schedule)
    concepts = [concept for concept, _ in acting.values()]
    if len(acting) < 2 or not all(concept.files for concept in concepts):
        return None
    weights = _weights([schedules for _, schedules in acting.values()], steps)
    if not weights:
        return None
    rescaled = model is not None and any(f.transform for concept in concepts for f in concept.lora.values())
    key = tuple(acting), weights, rescaled
    known = _joint.get(key)
    if known is None or (model is not None and not all(of.is_of(_layer(model, name)) for name, of in known[1])):
        known = _joint_change(concepts, weights, model if rescaled else None)
        _keep(_joint, key, known)
    return known[0]


def _weights(schedules: Sequence[Sequence[WeightSchedule]], steps: int) -> tuple[tuple[float, ...], ...]:
    """The weights of the LoRAs in all steps in which their joint change can be largest, if two act at all.

    Between the points of all schedules weights change evenly, and so the norm is a convex function of the step: it is
    largest at an end of such a stretch, or of the part of it in which two act.
    """
    every = [
        tuple(max((schedule.at(step, steps) for schedule in each), key=abs) for each in schedules)
        for step in range(steps)
    ]
    last = len(every) - 1

    def bends(step: int) -> bool:
        before, here, after = (every[min(max(step + by, 0), last)] for by in (-1, 0, 1))
        return any(not math.isclose(a + c, 2 * b, abs_tol=1e-9) for a, b, c in zip(before, here, after, strict=True))

    ends = {0, last, *(step for step in range(1, last) if bends(step))}
    near = sorted({min(max(end + by, 0), last) for end in ends for by in (-1, 0, 1)})
    return tuple(dict.fromkeys(every[step] for step in near if sum(map(bool, every[step])) > 1))


def _joint_change(
    concepts: Sequence[LoadedConcept], weights: Sequence[tuple[float, ...]], model: nn.Module | None
) -> tuple[Joint, Sequence[tuple[str, Version]]]:
    """The joint change, and the weights of the model that it depends on."""
    loras = [concept.lora if model is None else _with_column_norms(concept.lora, model) for concept in concepts]
    norms: list[dict[str, float]] = [dict(_norms_of(concept)) for concept in concepts]
    versions: dict[str, Version] = {}
    joint: dict[str, list[float]] = {}  # squared, in each step
    for name in dict.fromkeys(name for lora in loras for name in lora):
        changes = {i: lora[name] for i, lora in enumerate(loras) if name in lora}
        if any(factors.transform for factors in changes.values()):
            dense = None if model is None else _dense(model, name, changes)
            if model is not None and dense is not None:
                versions[name] = version_of(_layer(model, name))
                for i, change in dense.items():
                    norms[i][name] = float(change.square().sum())
                joint[name] = [_squared([each[i] * it for i, it in dense.items()]) for each in weights]
                continue
            changes = {i: factors for i, factors in changes.items() if factors.transform is None}
        if changes:
            joint[name] = [_norm([(it, each[i]) for i, it in changes.items()]) ** 2 for each in weights]
    largest = max(sum(known.values()) for known in norms)
    whole = [sum(each[k] for each in joint.values()) for k in range(len(weights))]
    most = max(range(len(weights)), key=whole.__getitem__)
    by_layer = {
        name: (math.sqrt(max(each)), math.sqrt(max(known.get(name, 0.0) for known in norms)))
        for name, each in joint.items()
    }
    ratio = math.sqrt(whole[most] / largest) if largest else 0.0
    return Joint(weights[most], by_layer, ratio, frozenset(versions)), [*versions.items()]


def _squared(parts: Sequence[Tensor]) -> float:
    return float(torch.stack([*parts]).sum(dim=0).square().sum())


def _dense(model: nn.Module, name: str, changes: Mapping[int, LoraFactors]) -> dict[int, Tensor] | None:
    """The changes of a layer's own weight; None if that is not to be had."""
    layer = _layer(model, name)
    try:
        weight = dense_weight(layer, _device_of(layer), dtype_of(model))
    except ValueError:
        return None
    return None if weight.is_meta else {i: factors.change_of(weight) for i, factors in changes.items()}


def _with_column_norms(lora: Lora, model: nn.Module) -> Lora:
    """A LoRA with the norms that layers of a model have together; without those layers, if they are not to be had."""
    modules = modules_of(model)
    try:
        return with_column_norms(lora, modules, _device_of(modules[next(iter(lora))]), dtype_of(model))
    except ValueError:
        return {
            name: it for name, it in lora.items() if not (isinstance(it.transform, Rescaling) and it.transform.fused)
        }


def _device_of(layer: nn.Module) -> torch.device:
    return next((it.device for it in layer.parameters() if not it.is_meta), torch.device("cpu"))


def _layer(model: nn.Module, name: str) -> nn.Module:
    return base_layer(uncompiled(model).get_submodule(name))


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


def warning(
    loaded: Sequence[LoadedConcept], joint: Joint, model: nn.Module, otherwise: str, *, few_steps: bool = False
) -> str:
    """Figures and a proposal for LoRAs that change more together than each was trained to, or than few steps may take.

    `otherwise` is what else to do than to lower weights, `few_steps` whether the model is one of few steps.
    """
    names = ", ".join(concept.concept.name for concept in loaded)
    aim, why = 1.0, ""
    if few_steps:
        aim = HELD_IN_FEW_STEPS
        why = f" Few-step models may take less than others: in a report one broke at 0.71 times and held at {aim}."
    lower = ", ".join(f"{weight * min(1.0, aim / joint.ratio):.2g}" for weight in joint.weights)
    share = joint.share_of(model)
    weights = "" if share is None else f", {share:.1%} of the weights that they change"
    return (
        f"{names} act on the same places: together their change is {joint.ratio:.2g} times the larger one as it was "
        f"trained{weights}.{why} If the image breaks, use weights such as {lower}{otherwise}"
    )


def _has_values(loaded: LoadedConcept) -> bool:
    return bool(loaded.factors.model) and not any(factors.down.is_meta for factors in loaded.factors.model.values())


def _norms_of(loaded: LoadedConcept) -> Mapping[str, float]:
    """The squared norm of each layer's change that does not depend on the model's weights, kept for the next call."""
    key = loaded.handle(loaded.factors.part)
    norms = _norms.get(key)
    if norms is None:
        norms = {name: inner(part, part) for name, part in loaded.lora.items() if part.transform is None}
    _keep(_norms, key, norms)
    return norms


def _keep(cache: OrderedDict[Any, Any], key: Hashable, value: object) -> None:
    """Keeps a value as the most recently used one, and no more than `_MOST`."""
    with _lock:
        cache[key] = value
        cache.move_to_end(key)
        while len(cache) > _MOST:
            cache.popitem(last=False)
