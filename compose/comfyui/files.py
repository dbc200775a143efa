"""Loads a LoRA file for a ComfyUI model: `pipelines.formats` parses it, ComfyUI's key map finds the modules."""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_compose.attention import Lora, LoraFactors
from lora_compose.attention.device import is_linear
from lora_compose.attention.fitting import check_factors, weight_shape
from lora_compose.pipelines.concepts.placing import placed, reshaped
from lora_compose.pipelines.formats.alphas import Alphas
from lora_compose.pipelines.formats.change import MAX_RANK
from lora_compose.pipelines.formats.files import LoraError, read_lora
from lora_compose.pipelines.formats.keys import parse
from lora_compose.pipelines.formats.layers import Layer, by_layer
from lora_compose.pipelines.formats.names import present_name

Target = str | tuple[Any, ...]
"""A weight of the model by its key; or the key, the part of its outputs as (0, first row, rows) or None, and perhaps
what ComfyUI does with a weight of the file before it is added."""

_DENOISERS = ("unet", "transformer")
_START, _END = "diffusion_model.", ".weight"
_FITTING = 0.1
"""The share of a file's layers below which it is for another model, as in our pipelines."""


def read_concept(path: Path, model: nn.Module, names: Mapping[str, Target]) -> tuple[Lora, Sequence[str]]:
    """The factors of a file for a model, and notes about what is left out.

    Args:
        path: A safetensors file.
        model: ComfyUI's `diffusion_model`.
        names: What ComfyUI calls each layer in files (`comfy.lora.model_lora_keys_unet`).

    Raises:
        LoraError: If the file cannot be read, is for another model, or has a change that cannot act in this one.
    """
    file = read_lora(path)
    grouped, alphas, targets = by_layer(file), Alphas(file), _targets(names)
    parts: dict[str, list[LoraFactors]] = defaultdict(list)
    taken: dict[tuple[str, int], str] = {}
    left_out, cut = [*grouped.unknown, *grouped.inexpressible], 0
    # Anima's adapter, which runs before a sampling.
    left_out += [key for layer in grouped.layers if layer.part == "text_conditioner" for key in layer.keys]
    mine = [layer for layer in grouped.layers if layer.part in _DENOISERS]
    for layer in mine:
        target = targets.get(present_name(layer.module))
        if target is None:
            left_out += layer.keys
            continue
        name, window, change = target
        if taken.setdefault((name, window.start if window else 0), layer.module) != layer.module:
            raise LoraError(f"{path.name} has more than one LoRA for {name}; expected one")
        try:
            factors, lost = _factors(layer, name, window, change, model, alphas)
        except LoraError:
            raise
        except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
            raise LoraError(f"{path.name}: {layer.module}: {error}") from error
        parts[name].append(factors)
        cut += lost
    found = sum(map(len, parts.values()))
    if not found or found < _FITTING * len(mine):
        raise LoraError(
            f"{path.name} fits this model in {found} of its {len(mine)} layers; choose a LoRA that was trained for it "
            f"(its first keys are {', '.join([*file.tensors][:3])})"
        )
    notes = [f"{len(left_out)} keys fit no layer and are left out: {', '.join(left_out[:3])}"] if left_out else []
    notes += [f"{cut} layers are cut to rank {MAX_RANK}"] if cut else []
    notes += [f"its words {', '.join(file.embeddings)} are left out"] if file.embeddings else []
    try:
        return {name: _together(name, of, model) for name, of in parts.items()}, notes
    except ValueError as error:
        raise LoraError(f"{path.name}: {error}") from error


def with_sites(names: Mapping[str, Target], sites: Collection[str]) -> Mapping[str, Target]:
    """The names of layers that concepts can act in; not e.g. those that read reference images."""
    keys = {name: target if isinstance(target, str) else target[0] for name, target in names.items()}
    return {name: names[name] for name, key in keys.items() if key[len(_START) : -len(_END)] in sites}


def read_text_encoders(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a file that change text encoders, which ComfyUI reads itself. Errors as for `read_concept`."""
    file = read_lora(path)
    layers = (layer for layer in by_layer(file).layers if layer.part.startswith("text_encoder"))
    return {key: file.tensors[key] for layer in layers for key in layer.keys}


def _targets(names: Mapping[str, Target]) -> Mapping[str, tuple[str, slice | None, Callable[[Tensor], Tensor] | None]]:
    """Target module, rows of its output and LoRA layer, by the layer name in `pipelines.formats`."""
    found = {}
    for spelled, target in names.items():
        key, window, change, *_ = (target, None, None) if isinstance(target, str) else (*target, None)
        parsed = parse(f"{spelled}.lora_A.weight")
        if parsed is not None and parsed.part in _DENOISERS and key.startswith(_START) and key.endswith(_END):
            rows = None if window is None else slice(window[1], window[1] + window[2])
            found[present_name(parsed.module)] = key[len(_START) : -len(_END)], rows, change
    return found


def _factors(
    layer: Layer,
    name: str,
    rows: slice | None,
    change: Callable[[Tensor], Tensor] | None,
    model: nn.Module,
    alphas: Alphas,
) -> tuple[LoraFactors, bool]:
    """The change of a layer, or of some of its outputs, as factors of the whole layer; and whether rank was lost."""
    if layer.refused:
        raise LoraError(f"{layer.module} is {layer.refused}")
    outputs, *inputs = weight_shape(model, name)
    wanted = outputs if rows is None else rows.stop - rows.start
    for found, side in zip(layer.kind.sides(layer.shapes), (wanted, math.prod(inputs)), strict=True):
        if found not in (None, side):
            raise ValueError(f"its change has a side of {found}, the model's layer {name} has {side}")
    module, whole = model.get_submodule(name), rows is None and change is None
    scale = alphas.scale(layer.module, layer)
    products = whole and is_linear(module)
    made = layer.kind.load(layer.parts, scale, MAX_RANK, products=products, settings=alphas.settings(layer))
    factors = made.factors
    if factors.transform is not None:
        if not whole:
            raise ValueError(
                f"it is a {layer.kind.name} of a part of {name}, whose weight is one matrix in ComfyUI; only one of "
                "whole layers can be read here"
            )
        factors = replace(factors, transform=placed(factors.transform, layer, module))
    factors = reshaped(factors, module)
    if not whole:
        up = factors.up if change is None else change(factors.up)
        padded = up.new_zeros(outputs, *up.shape[1:])
        padded[rows or slice(None)] = up
        factors = replace(factors, up=padded)
    return factors, made.lost > 0


def _together(name: str, parts: Sequence[LoraFactors], model: nn.Module) -> LoraFactors:
    """The changes of parts of a layer side by side."""
    factors = parts[0]
    if len(parts) > 1:
        if any(part.left is not None or part.transform is not None for part in parts):
            raise ValueError(f"it has more than one LoRA for {name}; expected one")
        ups = [part.up.float() * part.scale for part in parts]
        factors = LoraFactors(torch.cat([part.down.float() for part in parts]), torch.cat(ups, dim=1))
    check_factors(model, name, factors)
    return factors
