"""Tensors -> a safetensors file, one at a time: memory never holds more than one of them.

The header comes first and lists the offset of every tensor. So tensors are collected in a scratch file, and copied
behind the header once all are known. Wider types come first, so that each tensor begins at a multiple of its type's
size, whatever the others are. The format: https://github.com/huggingface/safetensors#format
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO

import torch
from torch import Tensor

from lora_compose.pipelines.support.finite import all_finite

_CHUNK = 1 << 20
_ALIGNMENT = 8  # of the header
_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class _Entry:
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsWriter:
    """Collects tensors in a scratch file, which is empty and open, and writes them as one file."""

    def __init__(self, scratch: BinaryIO) -> None:
        self._scratch = scratch
        self._entries: dict[str, _Entry] = {}
        self._end = 0

    def add(self, key: str, tensor: Tensor) -> None:
        """Takes a tensor. ValueError if its name is taken, it is no floating point, or not all of it is finite."""
        if key in self._entries or tensor.dtype not in _NAMES:
            raise ValueError(f"{key} is there already, or of type {tensor.dtype}; expected floating point")
        if not all_finite(tensor):
            raise ValueError(
                f"{key} has values that {tensor.dtype} cannot hold; write float32, or give smaller weights"
            )
        entry = _Entry(tensor.dtype, tuple(tensor.shape), self._end)
        self._scratch.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._entries[key] = entry
        self._end += entry.bytes

    def write(self, file: BinaryIO, metadata: Mapping[str, str]) -> None:
        """Writes a whole file, from the current position."""
        ordered = sorted(self._entries.items(), key=lambda item: -item[1].dtype.itemsize)
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        position = 0
        for key, entry in ordered:
            place = [position, position + entry.bytes]
            header[key] = {"dtype": _NAMES[entry.dtype], "shape": entry.shape, "data_offsets": place}
            position = place[1]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        file.write(len(text).to_bytes(8, "little") + text)
        for _, entry in ordered:
            self._scratch.seek(entry.start)
            left = entry.bytes
            while left:
                left -= file.write(self._scratch.read(min(left, _CHUNK)))
        self._scratch.seek(self._end)
