"""Matches the layers of a LoRA file with those of a pipeline's models."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, count
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lora_compose.attention.backbones import backbone_of
from lora_compose.attention.device import is_linear, modules_of, uncompiled
from lora_compose.attention.fitting import check_sides, shape_of, weight_shape
from lora_compose.attention.lora_bank import Lora, LoraFactors, base_layer
from lora_compose.pipelines.concepts.placing import FITTING, fitted, notes_on, rows_of, unclear
from lora_compose.pipelines.formats import kinds
from lora_compose.pipelines.formats.alphas import Alphas
from lora_compose.pipelines.formats.change import MAX_RANK, Change, inner
from lora_compose.pipelines.formats.files import LoraError, LoraFile, read_lora
from lora_compose.pipelines.formats.keys import PARTS, Part, parse
from lora_compose.pipelines.formats.layers import Layer, Layers, by_layer
from lora_compose.pipelines.formats.models import MODEL_PARTS, TEXT_ENCODERS, Models, model_part, models_by_part
from lora_compose.pipelines.formats.names import present_name, spellings
from lora_compose.pipelines.formats.rank_schedule import RankSchedule, rank_schedule
from lora_compose.pipelines.formats.recognise import guess_family, is_of
from lora_compose.pipelines.formats.transformer_names import swaps_halves

__all__ = ["Factors", "LoraError", "LoraFile", "adapter_factors", "match", "read_lora"]

logger = logging.getLogger(__name__)

_EXACT = 1e-5  # relative errors below are rounding
Changes = Mapping[Part, Mapping[str, Change]]


@dataclass(frozen=True)
class Factors:
    """A LoRA's factors for the parts of one pipeline.

    Attributes:
        model: For the UNet or transformer, by layer.
        text_encoders: For the text encoders, by component name and layer.
        unmatched: Keys of the file that match no layer.
        notes: Notes for the user: what was cut, left out or guessed.
        embeddings: Bundled words, as in `LoraFile`.
        error: Relative Frobenius error of the changes that were cut to a lower rank; 0 if none was.
        part: The component that the model is: "unet" or "transformer".
        ranks: How many ranks act in the model at which noise (T-LoRA); None means all, always.
        handle: Stands for these factors where something is kept that was made of them; no others have it.
    """

    model: Lora
    text_encoders: Mapping[Part, Lora] = field(default_factory=dict)
    unmatched: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    embeddings: Mapping[str, Mapping[Part, Tensor]] = field(default_factory=dict, repr=False)
    error: float = 0.0
    part: Part = "unet"
    ranks: RankSchedule | None = None
    handle: int = field(init=False, repr=False, compare=False, default_factory=count().__next__)

    @property
    def by_part(self) -> Mapping[Part, Lora]:
        """The factors of all parts by component name."""
        return {self.part: self.model, **self.text_encoders}

    @property
    def complete(self) -> bool:
        """Whether the whole file is used, exactly, and nothing was guessed."""
        return not self.unmatched and not self.notes

    @property
    def report(self) -> str:
        """One line: how many layers of which part, which ranks, what was left over, cut or guessed."""
        loras = self.by_part
        parts = [f"{len(lora)} {name} layers" for name, lora in loras.items() if lora]
        ranks = sorted({factors.rank for lora in loras.values() for factors in lora.values()})
        shown = "/".join(map(str, ranks)) if len(ranks) <= 4 else f"{ranks[0]} to {ranks[-1]}"
        facts = [f"{', '.join(parts)}, rank {shown}"]
        if self.unmatched:
            keys = ", ".join(self.unmatched[:3]) + (", ..." if len(self.unmatched) > 3 else "")
            facts.append(f"{len(self.unmatched)} keys fit no layer and are left out: {keys}")
        return "; ".join([*facts, *self.notes])


def match(
    file: LoraFile, pipe: object, *, alpha: float | None = None, max_rank: int = MAX_RANK, products: bool = False
) -> Factors:
    """Matches a file against the models of a pipeline.

    Args:
        pipe: A diffusers pipeline, or anything with a UNet or transformer and perhaps text encoders. Weights are not
            read.
        alpha: Alpha for a file without one; the change is scaled by alpha / rank.
        max_rank: LoHa, LoKr and full weight differences are exact up to this rank, and cut to it beyond.
        products: Whether a LoKr of more rank may stay a Kronecker product, which is exact (`LoraFactors.left`).

    Raises:
        LoraError: If no layer matches, a matching layer has another shape, or the file's kind is not supported.
    """
    _check_options(file, alpha, max_rank)
    grouped, models = by_layer(file), models_by_part(pipe)
    matched, unmatched = assign(file, grouped, pipe)
    alphas, model = Alphas(file, alpha), model_part(pipe)
    unread = _unread(matched, models, alphas)
    if unread and unread.keys() == {(part, name) for part, layers in matched.items() for name in layers}:
        raise LoraError(f"{file.path.name}: {next(iter(unread.values()))}")
    assigned: Mapping[Part, Mapping[str, Layer]] = {
        part: {name: layer for name, layer in layers.items() if (part, name) not in unread}
        for part, layers in matched.items()
    }
    unmatched += tuple(key for part, name in unread for key in matched[part][name].keys)
    _check_embeddings(file, models, backbone_of(models[model]).text_layers)
    targets: dict[Part, dict[str, nn.Module]] = {}
    for part, layers in assigned.items():
        modules = modules_of(models[part]) if layers else {}
        targets[part] = {name: base_layer(modules[name]) for name in layers}
        for name, layer in layers.items():
            _check_layer(file, targets[part][name], name, layer)
    loads = _Loads(alphas, max_rank, products)
    changes: Changes = {
        part: {name: _change(file, targets[part][name], name, layer, loads) for name, layer in layers.items()}
        for part, layers in assigned.items()
    }
    loras: dict[Part, Lora] = {
        part: {name: made.factors for name, made in changed.items()} for part, changed in changes.items()
    }
    text: dict[Part, Lora] = {part: loras[part] for part in TEXT_ENCODERS if loras[part]}
    ranks, unfollowed = rank_schedule(file, assigned[model].values(), bool(assigned["text_conditioner"]))
    notes = (*_notes(file, grouped, changes, alpha, max_rank), *unfollowed)
    notes += notes_on(unread.values())
    error = _error(made for changed in changes.values() for made in changed.values())
    return Factors(
        loras[model], text, unmatched, notes, file.embeddings, error if error > _EXACT else 0.0, model, ranks
    )


def assign(file: LoraFile, grouped: Layers, pipe: object) -> tuple[Mapping[Part, Mapping[str, Layer]], tuple[str, ...]]:
    """Finds the layer of a pipeline's models that each layer of a file means.

    By part, the file's layers by the name of the model's layer; and the keys that match none. Raises LoraError if
    nothing matches, or two layers of the file mean one of the model.
    """
    unmatched, assigned, models, model = list(grouped.unknown), {}, models_by_part(pipe), model_part(pipe)
    # Keys without a prefix, and kohya's, are the model's.
    meant = [(model if layer.part in MODEL_PARTS else layer.part, layer) for layer in grouped.layers]
    for part in PARTS:
        mine = [layer for component, layer in meant if component == part]
        assigned[part], left_over = _matched(file, part, models.get(part), mine)
        unmatched += left_over
    fitting = sum(map(len, assigned.values()))
    # Families share the names of a few layers, and some of them a text encoder.
    other = not assigned[model] and any(component == model for component, _ in meant)
    other = other or (bool(unmatched) and _is_of_another_family(file, models[model]))
    if other or fitting < FITTING * len(grouped.layers) or not fitting:
        raise LoraError(_nothing(file, fitting, len(grouped.layers)))
    return assigned, tuple(unmatched)


def _unread(
    assigned: Mapping[Part, Mapping[str, Layer]], models: Models, alphas: Alphas
) -> Mapping[tuple[Part, str], str]:
    """Layers whose change is one thing in training and another in a merged weight, and why."""
    reasons: dict[tuple[Part, str], str] = {
        (part, name): unclear(layer, base_layer(uncompiled(models[part]).get_submodule(name)), alphas)
        for part, layers in assigned.items()
        for name, layer in layers.items()
    }
    return {layer: why for layer, why in reasons.items() if why}


def _is_of_another_family(file: LoraFile, model: nn.Module) -> bool:
    """Whether a file is for another transformer, some of whose layers have the names and sizes of the model's."""
    guess = guess_family({key: tensor.shape for key, tensor in file.tensors.items()}, file.metadata)
    return guess.supported and not is_of(guess, type(uncompiled(model)).__name__)


def _check_options(file: LoraFile, alpha: float | None, max_rank: int) -> None:
    if max_rank < 1:
        raise LoraError(f"max_rank must be at least 1, not {max_rank}")
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        raise LoraError(f"alpha must be a positive number, not {alpha}")
    switched = {key for settings in file.config.values() for key, value in settings.items() if value}
    present = {key.kind for name in file.tensors if (key := parse(name)) is not None}
    for kind in kinds.KINDS:
        if kind.setting in switched and kind not in present:
            raise LoraError(
                f"{file.path.name} is a {kind.name} by its settings ({kind.setting}), but has no tensors of one; the "
                "file is incomplete"
            )
    if alpha is None and any(".lora_layer." in key for key in file.tensors):
        raise LoraError(
            f"{file.path.name} is a whole UNet with LoRA layers inside, as TARA's script for SD 1.5 saves it, and does "
            "not contain its alpha. That script trains with alpha 32 at rank 8, and its inference script uses a "
            "quarter of that. Give alpha=32 for the strength that was trained, or the rank (alpha=8) for the strength "
            "of the authors' images"
        )


def _matched(
    file: LoraFile, part: Part, model: nn.Module | None, layers: Sequence[Layer]
) -> tuple[dict[str, Layer], list[str]]:
    """Layers of the file by the name of the model's layer that they mean, and the keys that mean none."""
    if model is None:
        return {}, [key for layer in layers for key in layer.keys]
    known = spellings(model, part)
    sites = backbone_of(model).sites if part in MODEL_PARTS else None
    matched: dict[str, Layer] = {}
    left_over: list[str] = []
    for layer in layers:
        names = known.get(layer.module) or known.get(present_name(layer.module)) or ()
        if not names or (sites is not None and any(name not in sites for name in names)):
            left_over += layer.keys
            continue
        for name, mine in _shared_out(file, model, layer, names):
            if name in matched and not matched[name].same(mine):
                raise LoraError(
                    f"{file.path.name} has more than one LoRA for {part}.{name} ({matched[name].keys[0]}, "
                    f"{layer.keys[0]}); expected one adapter"
                )
            matched[name] = mine
    return matched, left_over


def _shared_out(file: LoraFile, model: nn.Module, layer: Layer, names: Sequence[str]) -> Iterable[tuple[str, Layer]]:
    """The part of a file's layer that belongs to each of the model's, whose outputs follow one another in it."""
    if len(names) == 1:
        return [(name, replace(layer, swapped=swaps_halves(name, layer.module))) for name in names]
    sizes = [weight_shape(uncompiled(model), name)[0] for name in names]
    try:
        apart = layer.apart
        outputs = None if layer.refused or apart else layer.kind.sides(layer.shapes)[0]
    except ValueError as error:
        raise LoraError(f"{file.path.name}: {layer.part}.{layer.module}: {error}") from error
    if apart:
        if len(apart) != len(names):
            raise LoraError(
                f"{file.path.name} does not fit this model: {layer.module} has {len(apart)} parts; expected "
                f"{len(names)}, {', '.join(names)}"
            )
        return zip(names, apart, strict=True)
    if outputs not in (None, sum(sizes)):
        raise LoraError(
            f"{file.path.name} does not fit this model: {layer.module} has {outputs} outputs; expected {sum(sizes)}, "
            f"those of {', '.join(names)}"
        )
    ends = list(accumulate(sizes))
    return [
        (name, replace(layer, outputs=slice(end - length, end), fused=tuple(names)))
        for name, end, length in zip(names, ends, sizes, strict=True)
    ]


def _nothing(file: LoraFile, fitting: int, layers: int) -> str:
    guess = guess_family({key: tensor.shape for key, tensor in file.tensors.items()}, file.metadata)
    looks = f"it looks like a file for {guess.family} ({guess.why[0]})" if guess.family else "is it for another one?"
    matches = (
        f"fits this model in {fitting} of its {layers} layers only" if fitting else "matches no layer of this model"
    )
    return f"{file.path.name} {matches}; its first keys are {', '.join([*file.tensors][:3])}; {looks}"


def _check_layer(file: LoraFile, target: nn.Module, name: str, layer: Layer) -> None:
    """Checks the kind of a layer's change, and that its size is that of the weight, before it is computed."""
    if layer.refused:
        raise LoraError(f"{file.path.name} is {layer.refused}")
    try:
        outputs, inputs = layer.kind.sides(layer.shapes)
        weight = shape_of(name, target)
    except ValueError as error:
        raise LoraError(f"{file.path.name}: {layer.part}.{name}: {error}") from error
    if layer.outputs is not None and outputs is not None:
        outputs = layer.outputs.stop - layer.outputs.start
    sides = weight[0], math.prod(weight[1:])
    if any(size not in (None, side) for size, side in zip((outputs, inputs), sides, strict=True)):
        change = " x ".join("any" if size is None else str(size) for size in (outputs, inputs))
        raise LoraError(
            f"{file.path.name} does not fit this model: {layer.part}.{name}: its change is {change}, the model's "
            f"weight {' x '.join(map(str, weight))}"
        )


@dataclass(frozen=True)
class _Loads:
    """Loads the layers of a file, each once, although it may be several layers of the model."""

    alphas: Alphas
    max_rank: int
    products: bool
    known: dict[Any, Change] = field(default_factory=dict)

    def of(self, name: str, layer: Layer, *, products: bool) -> Change:
        """The whole change of a layer of the file, for the model's layer of that name."""
        scale, settings = self.alphas.scale(name, layer), self.alphas.settings(layer)
        key = id(layer.slots), scale, products
        if key in self.known:
            return self.known[key]
        made = layer.kind.load(layer.parts, scale, self.max_rank, products=products, settings=settings)
        if layer.outputs is not None:
            self.known[key] = made
        return made


def _change(file: LoraFile, target: nn.Module, name: str, layer: Layer, loads: _Loads) -> Change:
    """The file's change of one layer, in the shapes that the layer needs."""
    try:
        products = loads.products and is_linear(target) and not layer.swapped
        made = loads.of(name, layer, products=products)
        if made.factors.left is not None and layer.outputs is not None:
            part = rows_of(made.factors, layer.outputs)
            made = loads.of(name, layer, products=False) if part is None else Change(part)
        if made.factors.left is None and layer.outputs is not None:
            made = Change(replace(made.factors, up=made.factors.up[layer.outputs]), made.lost / len(layer.fused))
        if layer.swapped:
            made = replace(made, factors=replace(made.factors, up=torch.cat(made.factors.up.chunk(2)[::-1])))
        made = fitted(made, layer, target)
        check_sides(name, made.factors, *shape_of(name, target))
    except LoraError:
        raise
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise LoraError(f"{file.path.name}: {layer.part}.{name}: {error}") from error
    return made


def _check_embeddings(file: LoraFile, models: Models, reading: int) -> None:
    """Checks that bundled words fit the text encoders and the layers that read them."""
    for word, by_part in file.embeddings.items():
        for part, vectors in by_part.items():
            _, layers, numbers = vectors.shape
            width = getattr(getattr(models.get(part), "config", None), "hidden_size", None)
            if width is not None and numbers != width:
                raise LoraError(
                    f"{file.path.name} does not fit this model: the vectors of {word!r} have {numbers} numbers, {part} "
                    f"has words of {width}"
                )
            if layers not in (1, reading):
                raise LoraError(
                    f"{file.path.name} does not fit this model: {word!r} has vectors for {layers} cross-attention "
                    f"layers, the model has {reading}"
                )


def _notes(file: LoraFile, grouped: Layers, changes: Changes, alpha: float | None, max_rank: int) -> Iterable[str]:
    """Notes on a file that is not used completely and exactly as it was trained."""
    if grouped.inexpressible:
        yield (
            f"{len(grouped.inexpressible)} keys with biases or norms are left out, since no low-rank change can "
            f"express them: {', '.join(grouped.inexpressible[:3])}"
        )
    if inside := _inside(grouped):
        yield (
            f"{len(inside)} of the keys that are left out belong to layers that are read ({inside[0]}): these may be "
            "of a kind that is not known here, and act as if the keys were not there"
        )
    errors = {f"{part}.{name}": _error([made]) for part, changed in changes.items() for name, made in changed.items()}
    if cut := {name: error for name, error in errors.items() if error > _EXACT}:
        worst = max(cut, key=lambda name: cut[name])
        whole = _error(made for changed in changes.values() for made in changed.values())
        yield (
            f"{len(cut)} layers have more rank than max_rank={max_rank} and are cut to it: relative error {whole:.2%}, "
            f"at most {cut[worst]:.2%} in one layer ({worst})"
        )
    peft = any(key.startswith("base_model.model.") for key in file.tensors)
    if peft and alpha is None and not file.config and not any(key.endswith(".alpha") for key in file.tensors):
        yield (
            "PEFT's adapter_config.json is not beside it, so its alpha is unknown and taken to be its rank; "
            "give alpha if it was trained with another"
            if any(layer.kind.scaled for layer in grouped.layers)
            else "PEFT's adapter_config.json is not beside it, so PEFT's defaults are taken for how it rotates"
        )


def _inside(grouped: Layers) -> Sequence[str]:
    """Keys of no known adapter that name a layer which other keys change."""
    parsed = {key: parse(key) for layer in grouped.layers for key in layer.keys}
    stems = {key.removesuffix(name.suffix) for key, name in parsed.items() if name is not None}
    return [key for key in grouped.unknown if any(key[:at] in stems for at, it in enumerate(key) if it == ".")]


def _error(made: Iterable[Change]) -> float:
    """The relative Frobenius error of changes that were cut to a rank."""
    made = list(made)
    lost = sum(change.lost for change in made)
    return math.sqrt(lost / (lost + sum(inner(change.factors, change.factors) for change in made))) if lost else 0.0


def adapter_factors(pipe: object, adapter: str) -> Factors:
    """The factors of an adapter that the user has loaded with `load_lora_weights`, at the scale PEFT gives it.

    Raises:
        LoraError: If it is not a plain LoRA or is fused into the weights.
    """
    loras = {part: _adapter_layers(model, adapter) for part, model in models_by_part(pipe).items()}
    model = model_part(pipe)
    return Factors(loras[model], {part: loras[part] for part in TEXT_ENCODERS if loras.get(part)}, part=model)


def _adapter_layers(model: nn.Module, adapter: str) -> Lora:
    layers = {}
    for name, module in uncompiled(model).named_modules():
        if not isinstance(module, BaseTunerLayer) or adapter not in _adapter_names(module):
            continue
        if not isinstance(module, LoraLayer) or adapter in module.lora_variant or module.lora_bias[adapter]:
            raise LoraError(
                f"adapter {adapter!r} is not a plain LoRA at {name} (DoRA, LoKr or with a bias), which is not "
                "supported; load its file with `load_concept` instead"
            )
        if adapter in module.merged_adapters:
            raise LoraError(f"adapter {adapter!r} is fused into the weights; call `unfuse_lora()` first")
        down, up = (_real_weight(side[adapter]) for side in (module.lora_A, module.lora_B))
        layers[name] = LoraFactors(down, up, float(module.scaling[adapter]))
    return layers


def _adapter_names(module: BaseTunerLayer) -> set[str]:
    return {name for attribute in module.adapter_layer_names for name in getattr(module, attribute, ())}


def _real_weight(module: nn.Module) -> Tensor:
    """A weight, also under sequential offload, which keeps the data outside of the module."""
    weight = module.get_parameter("weight")
    return (getattr(module, "_hf_hook").weights_map["weight"] if weight.is_meta else weight).detach()  # noqa: B009
