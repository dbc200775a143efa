"""How strongly a file's factors act: alpha / rank, from the file's keys, from PEFT's settings, or as told."""

import math
import re
import warnings
from collections.abc import Mapping
from typing import Any

from peft.utils.other import get_pattern_key

from pipelines.formats.deltas import rank_of
from pipelines.formats.files import LoraError, LoraFile
from pipelines.formats.layers import Layer

# Patterns come from strangers, and regular expressions with many repetitions may take longer than anybody waits.
_LONG, _REPEATS = 200, 3


def said_alpha(file: LoraFile, name: str, layer: Layer) -> float | None:
    """The alpha that a file says of a layer: with a key, or in PEFT's configuration; None if it does not.

    Raises:
        LoraError: If it is no positive number.
    """
    try:
        if "alpha" in layer.slots:
            return _positive(layer.slots["alpha"])
        return _configured(_config(file, layer), name)
    except (AttributeError, TypeError, ValueError, OverflowError, re.error) as error:
        where = "a key" if "alpha" in layer.slots else "lora_adapter_metadata or adapter_config.json"
        raise LoraError(f"{file.path.name}: {where} gives {layer.part}.{name} no usable alpha: {error}") from error


def _config(file: LoraFile, layer: Layer) -> Mapping[str, Any]:
    return {**file.config.get("", {}), **file.config.get(layer.part, {})}


def scale_of(file: LoraFile, name: str, layer: Layer, told: float | None) -> float:
    """Alpha / rank; alpha as the file says it, else as told, else the rank.

    Raises:
        ValueError: If there is no usable alpha, or one is told beside the file's own.
    """
    scalar = float(layer.slots["scalar"]) if "scalar" in layer.slots else 1.0
    if not math.isfinite(scalar):
        raise ValueError(f"its scalar is {scalar}")
    said, config = said_alpha(file, name, layer), _config(file, layer)
    rank = rank_of(layer.slots)
    if rank is None:  # a whole weight: alpha counts only where PEFT says the rank as well
        return scalar * said / _positive(config["r"]) if said is not None and "r" in config else scalar
    if said is not None and told is not None:
        raise ValueError("the file says its alpha itself; leave alpha out")
    rescaled = config.get("use_rslora") and "alpha" not in layer.slots
    return scalar * (said or told or rank) / (rank**0.5 if rescaled else rank)


def _configured(config: Mapping[str, Any], name: str) -> float | None:
    """PEFT's alpha of a layer; None where it says none. LoHa and LoKr call it "alpha"."""
    patterns: dict[str, Any] = config.get("alpha_pattern") or {}
    for pattern in patterns:
        if len(pattern) > _LONG or len(re.findall(r"[*+{]", pattern)) > _REPEATS or re.search(r"\)[*+?{]", pattern):
            raise ValueError(f"the pattern {pattern[:_LONG]!r} could take forever to be looked for")
    with warnings.catch_warnings(action="ignore"):  # about how strangers write patterns
        pattern = get_pattern_key(list(patterns), name)
    for found, key in ((patterns, pattern), (config, "lora_alpha"), (config, "alpha")):
        if key in found:
            return _positive(found[key])
    return None


def _positive(value: Any) -> float:
    number = float(value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"alpha is {number}; expected a positive number")
    return number
