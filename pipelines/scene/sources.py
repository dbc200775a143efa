"""How a concept names its LoRA: one file, or several that are merged, each with its weight."""

import math
from collections.abc import Callable, Sequence

LoraFiles = str | tuple[str, ...] | list[str] | None
"""A file as it is, or several, written as in "cat.safetensors:0.8". Concepts keep a list as a tuple."""


def parse_lora(text: str) -> tuple[str, float]:
    """A LoRA and its weight, "cat.safetensors:0.8", by default 1. ValueError if it is not finite, or no LoRA."""
    source, colon, number = text.rpartition(":")
    try:
        weight = float(number)
    except ValueError:
        source, weight = text, 1.0
    if not colon:
        source, weight = text, 1.0
    if not source.strip():
        raise ValueError(f"{text!r} names no LoRA; expected a file, a hub repository or playground:NAME")
    if not math.isfinite(weight):
        raise ValueError(f"{text}: the weight is {number}; expected a number such as 0.8")
    return source, weight


def weighted(lora: LoraFiles) -> tuple[tuple[str, float], ...]:
    """The files of a concept with their weights; an only file has none, so that its name may end in a number."""
    if lora is None or isinstance(lora, str):
        return ((lora, 1.0),) if lora else ()
    return tuple(map(parse_lora, lora))


def files_of(lora: LoraFiles) -> tuple[str, ...]:
    """The files of a concept, without their weights."""
    return tuple(source for source, _ in weighted(lora))


def moved_files(lora: LoraFiles, move: Callable[[str], str]) -> LoraFiles:
    """A LoRA with every file moved."""
    return with_files(lora, [*map(move, files_of(lora))])


def with_files(lora: LoraFiles, files: Sequence[str]) -> LoraFiles:
    """A LoRA with other files, in the same order and of the same weights."""
    if lora is None or isinstance(lora, str):
        return files[0] if files else lora
    pairs = zip(files, weighted(lora), strict=True)
    return tuple(f"{file}{_suffix(file, weight)}" for file, (_, weight) in pairs)


def shown(lora: LoraFiles) -> str:
    """All files in a line."""
    return lora or "" if lora is None or isinstance(lora, str) else " + ".join(lora)


def _suffix(file: str, weight: float) -> str:
    """The weight after a file's name; also that of 1 where the name would be read as one with a weight."""
    return "" if weight == 1 and parse_lora(file) == (file, 1) else f":{weight!r}"
