"""A safetensors file from one open descriptor: header first, then tensors and the digest of the file in a single pass.

The safetensors library opens files by path only. A digest then needs a second open, and a file that is replaced in
between gives the tensors of one file and the digest of another. Reading in one pass also keeps only the wanted tensors
in memory, and lets sizes, shapes and types be checked before anything is built. The format:
https://github.com/huggingface/safetensors#format
"""

import json
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from io import BufferedReader
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

MAX_HEADER = 8 << 20
"""The longest header that is read, in bytes."""

MAX_TENSORS = 20_000
"""The most tensors that a file may have: every name is searched for patterns, which takes time."""

MAX_BYTES = 4 << 30
"""The most bytes of the tensors that are read: they are all in memory at once."""

MAX_DIMENSIONS = 8
"""The most dimensions of a tensor; convolutions have four or five."""

_CHUNK = 1 << 20
_ALIGNMENT = 64  # bytes, as PyTorch aligns tensors
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class DamagedError(ValueError):
    """The bytes are not a complete safetensors file."""


class Digest(Protocol):
    """A hash object of `hashlib`."""

    def update(self, data: Any, /) -> None:
        """Takes the next bytes of the file."""


@dataclass(frozen=True)
class Entry:
    """One tensor in a header.

    Attributes:
        dtype: The format's name of it ("F16").
        shape: As stored.
        start: Its first byte, counted from the end of the header.
        stop: The byte after its last.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """The header of a file.

    Attributes:
        entries: Its tensors by key, in the order of their bytes, which follow each other without a gap.
        raw: The bytes of the file up to the first tensor.
    """

    metadata: Mapping[str, str]
    entries: Mapping[str, Entry]
    raw: bytes


def read_header(file: BufferedReader) -> Header:
    """Reads and checks a header of a file at its first byte; no tensor is read.

    Raises DamagedError for no safetensors file, or a truncated or damaged one, and ValueError for a header longer than
    `MAX_HEADER`, or of more than `MAX_TENSORS`.
    """
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if size < 8 or length > size - 8:
        raise DamagedError("the header is longer than the file")
    if length > MAX_HEADER:
        raise ValueError(f"it has a header of {length / 2**20:.1f} MiB; a LoRA's has at most {MAX_HEADER >> 20} MiB")
    text = file.read(length)
    tensors = text.count(b'"dtype"')  # cheaper than parsing that many
    if tensors > MAX_TENSORS:
        raise ValueError(f"it has {tensors} keys; a LoRA has at most {MAX_TENSORS}")
    try:
        header = json.loads(text)
    except RecursionError as error:
        raise DamagedError("the header is nested too deeply") from error
    except ValueError as error:
        raise DamagedError(f"the header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise DamagedError("the header does not list tensors")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise DamagedError("the metadata in the header are not strings")
    entries = {key: _entry(key, value) for key, value in header.items()}
    # An empty tensor comes before the one that begins at the same byte.
    in_order = sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop))
    position = 0
    for key, entry in in_order:
        if entry.start != position:
            raise DamagedError(f"{key[:80]!r} does not begin where the tensor before it ends")
        position = entry.stop
    if position != size - 8 - length:
        raise DamagedError(f"its tensors take {position} bytes, and {size - 8 - length} follow the header")
    return Header(metadata, dict(in_order), prefix + text)


def read_tensors(file: BufferedReader, header: Header, wanted: Collection[str], digest: Digest) -> dict[str, Tensor]:
    """Reads what follows the header to the end, where `read_header` left the file, and keeps the wanted keys.

    The digest is updated with every byte. Raises DamagedError if the file has become shorter, and ValueError if a
    wanted tensor is of a type or shape that is not supported.
    """
    wanted = frozenset(wanted)
    for key in wanted:
        _check(key, header.entries[key])
    digest.update(header.raw)
    kept = {key: entry for key, entry in header.entries.items() if key in wanted}
    if (size := sum(entry.stop - entry.start for entry in kept.values())) > MAX_BYTES:
        raise ValueError(
            f"its tensors have {size / 2**30:.1f} GiB; at most {MAX_BYTES >> 30} GiB are read: store them in float16, "
            "or at a lower rank"
        )
    starts = list(accumulate((_aligned(entry.stop - entry.start) for entry in kept.values()), initial=0))
    whole = torch.empty(starts.pop(), dtype=torch.uint8)  # one block: hundreds of small ones fragment the memory
    inside, tensors = dict(zip(kept, starts, strict=True)), {}
    for key, entry in header.entries.items():
        if key not in wanted:
            _skip(file, entry.stop - entry.start, digest)
            continue
        part = whole.narrow(0, inside[key], entry.stop - entry.start)
        data = part.numpy().data
        if file.readinto(data) != len(data):
            raise DamagedError("the file became shorter while it was read")
        digest.update(data)
        tensors[key] = part.view(_DTYPES[entry.dtype]).view(entry.shape)
    return tensors


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _entry(key: str, value: Any) -> Entry:
    try:
        dtype, shape, (start, stop) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise DamagedError(f"the header does not describe {key[:80]!r}") from error
    numbers = (*shape, start, stop)
    if not isinstance(dtype, str) or not all(type(number) is int and number >= 0 for number in numbers) or start > stop:
        raise DamagedError(f"the header does not describe {key[:80]!r}")
    return Entry(dtype, shape, start, stop)


def _check(key: str, entry: Entry) -> None:
    if len(entry.shape) > MAX_DIMENSIONS:
        raise ValueError(f"{key} has {len(entry.shape)} dimensions; expected at most {MAX_DIMENSIONS}")
    if entry.dtype not in _DTYPES:
        raise ValueError(f"{key} is stored as {entry.dtype}; expected float32, float16 or bfloat16")
    if math.prod(entry.shape) * _DTYPES[entry.dtype].itemsize != entry.stop - entry.start:
        raise ValueError(f"{key} of shape {list(entry.shape)} does not have {entry.stop - entry.start} bytes")


def _skip(file: BufferedReader, count: int, digest: Digest) -> None:
    while count:
        data = file.read(min(count, _CHUNK))
        if not data:
            raise DamagedError("the file became shorter while it was read")
        digest.update(data)
        count -= len(data)
