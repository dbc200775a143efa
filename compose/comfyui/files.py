"""Loads a LoRA file into a ComfyUI model: `pipelines.formats` parses it, ComfyUI's key map finds the modules."""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_compose.attention import Lora, LoraFactors
from lora_compose.attention.device import is_linear
from lora_compose.attention.fitting import check_factors, weight_shape
from lora_compose.pipelines.concepts.placing import FITTING, fitted, notes_on, unclear
from lora_compose.pipelines.formats.alphas import Alphas
from lora_compose.pipelines.formats.change import MAX_RANK, Change
from lora_compose.pipelines.formats.files import LoraError, LoraFile
from lora_compose.pipelines.formats.keys import parse
from lora_compose.pipelines.formats.layers import Layer, by_layer
from lora_compose.pipelines.formats.names import present_name
from lora_compose.pipelines.formats.rank_schedule import ALL_RANKS, is_tlora

Target = str | tuple[Any, ...]
"""A weight of the model by its key; or the key, the part of its outputs as (0, first row, rows) or None, and perhaps
what ComfyUI does with a weight of the file before it is added."""

_DENOISERS, _TEXT = ("unet", "transformer"), "text_encoder"
_START, _END = "diffusion_model.", ".weight"


@dataclass(frozen=True)
class _Place:
    """Where the change of a layer of a file acts in a layer of the model.

    Attributes:
        rows: Outputs that it changes; None for all.
        change: What ComfyUI does with a weight of the file before it is added.
    """

    name: str
    rows: slice | None
    change: Callable[[Tensor], Tensor] | None


def read_concept(
    file: LoraFile, model: nn.Module, names: Mapping[str, Target], sites: Collection[str], *, products: bool = True
) -> tuple[Lora, Sequence[str]]:
    """The factors of a file for a model, and notes about what is left out.

    Args:
        model: ComfyUI's `diffusion_model`.
        names: What ComfyUI calls each layer in files (`comfy.lora.model_lora_keys_unet`).
        sites: Layers that concepts can act in; not e.g. those that read reference images.
        products: Whether a LoKr of a whole layer may stay a Kronecker product, which is exact.

    Raises:
        LoraError: If the file is for another model, or has a change that cannot act in this one.
    """
    grouped, alphas, places = by_layer(file), Alphas(file), _places(names, sites)
    mine: dict[str, list[tuple[Layer, _Place]]] = defaultdict(list)
    left_out, unread = [*grouped.unknown, *grouped.inexpressible], []
    layers = [layer for layer in grouped.layers if layer.part in _DENOISERS]
    for layer in grouped.layers:
        place = places.get(present_name(layer.module)) if layer.part in _DENOISERS else None
        if place is not None and (why := unclear(layer, model.get_submodule(place.name), alphas)):
            unread.append(why)
        elif place is not None:
            mine[place.name].append((layer, place))
        elif not layer.part.startswith(_TEXT):
            left_out += layer.keys
    matched, lora, cut = sum(map(len, mine.values())), {}, 0
    if not matched or matched < FITTING * len(layers):
        raise LoraError(
            f"{file.path.name} fits this model in {matched} of its {len(layers)} layers; choose a LoRA that was "
            f"trained for it (its first keys are {', '.join([*file.tensors][:3])})"
        )
    for name, parts in mine.items():
        try:
            lora[name], lost = _together(name, parts, model, alphas, products)
        except LoraError:
            raise
        except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
            raise LoraError(f"{file.path.name}: {name}: {error}") from error
        cut += lost
    notes = [f"{len(left_out)} keys fit no layer and are left out: {', '.join(left_out[:3])}"] if left_out else []
    notes += notes_on(unread)
    notes += [f"{cut} layers are cut to rank {MAX_RANK}"] if cut else []
    notes += [f"its words {', '.join(file.embeddings)} are left out"] if file.embeddings else []
    notes += [f"it is {ALL_RANKS}"] if is_tlora(file.metadata, file.tensors) else []
    return lora, notes


def read_text_encoders(file: LoraFile) -> Mapping[str, Tensor]:
    """The tensors of a file that change text encoders, which ComfyUI reads itself."""
    layers = (layer for layer in by_layer(file).layers if layer.part.startswith(_TEXT))
    return {key: file.tensors[key] for layer in layers for key in layer.keys}


def _places(names: Mapping[str, Target], sites: Collection[str]) -> Mapping[str, _Place]:
    """Where layers of files act, by their names in `pipelines.formats`."""
    places = {}
    for spelled, target in names.items():
        key, window, change, *_ = (target, None, None) if isinstance(target, str) else (*target, None)
        name, parsed = key.removeprefix(_START).removesuffix(_END), parse(f"{spelled}.lora_A.weight")
        if parsed is not None and parsed.part in _DENOISERS and name in sites:
            rows = None if window is None else slice(window[1], window[1] + window[2])
            places[present_name(parsed.module)] = _Place(name, rows, change)
    return places


def _together(
    name: str, parts: Sequence[tuple[Layer, _Place]], model: nn.Module, alphas: Alphas, products: bool
) -> tuple[LoraFactors, int]:
    """The changes of a layer's parts side by side, and how many have lost rank."""
    starts = {place.rows.start if place.rows else 0 for _, place in parts}
    made = [_factors(layer, place, model, alphas, products) for layer, place in parts]
    factors, lost = made[0].factors, sum(change.lost > 0 for change in made)
    if len(made) > 1:
        each = [change.factors for change in made]
        if len(starts) < len(each) or any(part.left is not None or part.transform for part in each):
            raise ValueError("it has more than one LoRA; expected one")
        ups = [part.up.float() * part.scale for part in each]
        factors = LoraFactors(torch.cat([part.down.float() for part in each]), torch.cat(ups, dim=1))
    check_factors(model, name, factors)
    return factors, lost


def _factors(layer: Layer, place: _Place, model: nn.Module, alphas: Alphas, products: bool) -> Change:
    """The change of a layer, or of some of its outputs, as one of the whole layer."""
    if layer.refused:
        raise ValueError(f"{layer.module} is {layer.refused}")
    name, rows, whole = place.name, place.rows, place.rows is None and place.change is None
    outputs, *inputs = weight_shape(model, name)
    wanted = outputs if rows is None else rows.stop - rows.start
    for of_file, of_model in zip(layer.kind.sides(layer.shapes), (wanted, math.prod(inputs)), strict=True):
        if of_file not in (None, of_model):
            raise ValueError(
                f"the change of {layer.module} has a side of {of_file}, the model's layer has {of_model}; choose a "
                "LoRA that was trained for this model"
            )
    module, settings = model.get_submodule(name), alphas.settings(layer)
    products, scale = products and whole and is_linear(module), alphas.scale(layer.module, layer)
    made = layer.kind.load(layer.parts, scale, MAX_RANK, products=products, settings=settings)
    if made.factors.transform is not None and not whole:
        raise ValueError(
            f"it is a {layer.kind.name} of a part of {name}, whose weight is one matrix in ComfyUI; only one of whole "
            "layers can be read here"
        )
    made = fitted(made, layer, module)
    if whole:
        return made
    up = made.factors.up if place.change is None else place.change(made.factors.up)
    padded = up.new_zeros(outputs, *up.shape[1:])
    padded[rows or slice(None)] = up
    return replace(made, factors=replace(made.factors, up=padded))
