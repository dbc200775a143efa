"""Names and shapes of LoRA files as real trainers write them: `fixtures/lora_layouts`, each with its public source."""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_compose.pipelines.formats.files import LoraFile, lora_file, wanted_keys

FOLDER = Path(__file__).parent / "fixtures" / "lora_layouts"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))


def layout(name: str) -> dict[str, Any]:
    """What is known of a trainer's files."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def written_out(pattern: str) -> Iterator[str]:
    """The names that a pattern stands for: "layers_{0..11}_{q,k}_proj" stands for 24."""
    pieces = re.split(r"\{([^}]*)\}", pattern)
    choices = [list(_choices(piece)) if i % 2 else [piece] for i, piece in enumerate(pieces)]
    return map("".join, itertools.product(*choices))


def _choices(text: str) -> Iterator[str]:
    if found := re.fullmatch(r"(\d+)\.\.(\d+)", text):
        yield from map(str, range(int(found[1]), int(found[2]) + 1))
    else:
        yield from text.split(",")


def shapes_of(known: dict[str, Any]) -> dict[str, list[int]]:
    """Every key of the file, and its shape."""
    return {
        f"{name}{suffix}": shape
        for pattern, tensors in known["tensors"].items()
        for name in written_out(pattern)
        for suffix, shape in tensors.items()
    }


def file_of(known: dict[str, Any], value: float = 1.0) -> LoraFile:
    """The file as read; its tensors hold one number, and take no memory."""
    shapes, path = shapes_of(known), Path("it.safetensors")
    found: dict[str, Tensor] = {key: torch.tensor(value).expand(shapes[key]) for key in wanted_keys(path, shapes)}
    return lora_file(path, "", known["metadata"], found)
