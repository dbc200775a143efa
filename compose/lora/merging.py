"""Merges LoRA files whose layers are matched: one layer after the other, and written at once."""

import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

import torch
from pydantic import BaseModel
from torch import Tensor

from lora_compose.attention import LoraFactors
from lora_compose.compose.files.atomic import write_new, write_whole
from lora_compose.compose.lora.file_inspection import RECORD, block_of
from lora_compose.compose.support.version import __version__
from lora_compose.pipelines.formats.files import LoraFile
from lora_compose.pipelines.formats.lora_writer import FileLayer, Spelling, tensors
from lora_compose.pipelines.formats.safetensors_writer import SafetensorsWriter
from lora_compose.pipelines.merging import Changes, Merger, Moments, settings_of
from lora_compose.pipelines.merging.changes import Name, begin
from lora_compose.pipelines.merging.factors import gram, matrices, spectrum

try:
    import resource
except ImportError:  # Windows
    resource = None

# Header entries about the base model; kept if all merged files agree.
_BASE = (
    "base_model",
    "ss_base_model_version",
    "ss_sd_model_name",
    "modelspec.architecture",
    "modelspec.sai_model_spec",
)


@dataclass(frozen=True)
class Given:
    """A file that is merged, and its weight."""

    source: str
    file: LoraFile
    weight: float = 1.0


@dataclass(frozen=True, eq=False)
class Matched:
    """Files whose layers were matched with each other.

    Attributes:
        changes: By layer, the change by every file, weights in the scales; rank 0 where a file does not change it.
    """

    given: Sequence[Given]
    changes: Mapping[Name, Changes]
    layers: Mapping[Name, FileLayer]
    spelling: Spelling
    notes: tuple[str, ...]


class MergedBlock(BaseModel, frozen=True):
    """The merge of one block of a model.

    Attributes:
        name: Such as "unet.down_blocks.1"; "all" for the whole file.
        ranks_before: Smallest and largest sum of ranks of a layer.
        ranks_after: Smallest and largest rank of a layer that was written.
        norm: Frobenius norm of what was written.
        energy: Squared norm, divided by that of the weighted sum of the changes; None if that is 0.
        kept: By file, how much of its weighted change D is in the result M: <M, D> / |D|^2. 1 means all of it, and more
            that other files add to it; None if the file changes nothing.
        cut: The fraction of the energy that is left after the cut to a rank; 1 without a cut.
        overlaps: By pair of files, <A, B>^2 / (|A|^2 |B|^2).
    """

    name: str
    layers: int
    ranks_before: tuple[int, int]
    ranks_after: tuple[int, int]
    norm: float
    energy: float | None
    kept: tuple[float | None, ...]
    cut: float
    overlaps: tuple[float, ...]


class Report(BaseModel, frozen=True):
    """The result of a merge.

    Attributes:
        size: In bytes.
        blocks: By block, the whole last.
        peak_bytes: Peak memory of this process, including libraries; None if the system does not report it.
    """

    out: str
    size: int
    files: tuple[tuple[str, float], ...]
    blocks: tuple[MergedBlock, ...]
    notes: tuple[str, ...]
    seconds: float
    peak_bytes: int | None


def merge_files(
    matched: Matched,
    merger: Merger,
    out: Path,
    *,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
    moments: Mapping[Name, Moments] | None = None,
    method: str = "",
    overwrite: bool = False,
    on_progress: Callable[[float], None] | None = None,
) -> Report:
    """Merges files layer by layer into a new one, which appears whole or not at all.

    Layers of a higher rank than `rank` are cut to it, by singular values; the precision is fp16 or bf16 by default if
    all files have it, otherwise fp32; `moments`, by layer, are for mergers that need a model. Raises ValueError if the
    result is zero, or values do not fit the precision, and OSError if it cannot be written.
    """
    began = time.perf_counter()
    check_free(out, overwrite)
    dtype = dtype or _dtype(matched.given)
    layers = list(matched.changes.items())
    merge = begin(merger, [changes for _, changes in layers], [entry.weight for entry in matched.given])
    largest = max(sum(change.rank for change in changes) for _, changes in layers)
    alpha = max(1, largest if rank is None else min(rank, largest))
    tally = Tally(len(matched.given))
    on_its_disk = next(folder for folder in out.absolute().parents if folder.is_dir())  # at least the root
    with TemporaryFile(dir=on_its_disk) as scratch:
        writer = SafetensorsWriter(scratch)
        for done, (name, changes) in enumerate(layers, 1):
            merged = merge(changes, None if moments is None else moments.get(name))
            merged, kept = (merged, 1.0) if rank is None else _cut(merged, rank)
            tally.add(_block(name), changes, merged, kept)
            up, down = matrices(merged)
            for key, tensor in tensors(matched.spelling, matched.layers[name], LoraFactors(down, up), dtype, alpha):
                writer.add(key, tensor)
            if on_progress is not None:
                on_progress(done / len(layers))
        if not tally.written:
            raise ValueError("nothing is left: the merged change is zero in every layer")
        metadata = _metadata(matched, merger, method, rank)

        def write(file: BinaryIO) -> None:
            writer.write(file, metadata)

        if overwrite:
            write_whole(out, write)
        else:
            write_new(out, write, lambda path: check_free(path, overwrite))
    return Report(
        out=str(out), size=out.stat().st_size,
        files=tuple((entry.source, entry.weight) for entry in matched.given), blocks=tuple(tally.blocks()),
        notes=matched.notes, seconds=time.perf_counter() - began, peak_bytes=_peak(),
    )  # fmt: skip


def check_free(path: Path, overwrite: bool) -> Path:
    """A path that may be written. Raises ValueError for a file that must stay, or no name of a safetensors file."""
    if path.suffix.lower() != ".safetensors":
        raise ValueError(f"{str(path)!r} is not a LoRA file name; expected one that ends in .safetensors")
    if path.is_dir() or (os.path.lexists(path) and not overwrite):  # also a link that leads nowhere
        raise ValueError(f"{str(path)!r} is there already; choose another name, or add --overwrite")
    return path


def _cut(change: LoraFactors, rank: int) -> tuple[LoraFactors, float]:
    """The best approximation of a rank, and its share of the energy."""
    if change.rank <= rank:
        return change, 1.0
    singular = spectrum(change)
    energy = singular.values**2
    return singular.factors(rank), float(energy[:rank].sum() / energy.sum()) if singular.rank else 1.0


def _dtype(given: Sequence[Given]) -> torch.dtype:
    dtypes = {tensor.dtype for entry in given for tensor in entry.file.tensors.values() if tensor.ndim > 1}
    (only, *more) = dtypes or {torch.float32}
    return only if not more and only in (torch.float16, torch.bfloat16) else torch.float32


def _block(name: Name) -> str:
    part, layer = name
    if part != "unet" or "." in layer:
        return block_of(part, layer)
    numbered = re.search(r"[a-z]\w*?(?:blocks|layers)_\d+", layer)  # a name as its file has it
    return f"model.{numbered[0] if numbered else layer}"


def _metadata(matched: Matched, merger: Merger, method: str, rank: int | None) -> dict[str, str]:
    record = {
        "method": method or type(merger).__name__,
        "settings": settings_of(merger),
        "rank": rank,
        "files": [
            {"name": entry.file.path.name, "sha256": entry.file.sha256, "weight": entry.weight}
            for entry in matched.given
        ],
        "version": __version__,
    }
    headers = [entry.file.metadata for entry in matched.given]
    agreed = {key: headers[0][key] for key in _BASE if key in headers[0] and len({h.get(key) for h in headers}) == 1}
    triggers = {entry.file.trigger: entry.file.class_word for entry in matched.given if entry.file.trigger}
    if len(triggers) == 1:
        ((trigger, word),) = triggers.items()
        agreed |= {"trigger": trigger, **({"class_word": word} if word else {})}
    return {"format": "pt", RECORD: json.dumps(record), **agreed}


def _peak() -> int | None:
    """The most memory that this process has had, in bytes."""
    if resource is None:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


class Tally:
    """Inner products of all changes and of the results, summed by block."""

    def __init__(self, files: int) -> None:
        self._files = files
        self._sums: dict[str, Tensor] = {}
        self._whole: dict[str, float] = {}
        self._ranks: dict[str, list[tuple[int, int]]] = {}

    @property
    def written(self) -> int:
        """The sum of the ranks that are written."""
        return sum(after for ranks in self._ranks.values() for _, after in ranks)

    def add(self, block: str, changes: Changes, merged: LoraFactors, kept: float) -> None:
        """Adds a layer: its changes, the result, and the share of its energy that the cut to a rank kept."""
        products = gram([*changes, merged])
        self._sums[block] = self._sums.get(block, 0) + products
        self._whole[block] = self._whole.get(block, 0.0) + float(products[-1, -1]) / kept
        self._ranks.setdefault(block, []).append((sum(change.rank for change in changes), merged.rank))

    def blocks(self) -> Iterator[MergedBlock]:
        """The merge of each block, and of the whole."""
        for name, products in self._sums.items():
            yield self._block(name, products, self._whole[name], self._ranks[name])
        products = sum(self._sums.values(), torch.zeros(()))
        yield self._block("all", products, sum(self._whole.values()), [*chain(*self._ranks.values())])

    def _block(self, name: str, products: Tensor, uncut: float, ranks: list[tuple[int, int]]) -> MergedBlock:
        n = self._files
        energy = products.diagonal().clamp(min=0).tolist()
        whole = float(products[:n, :n].sum())
        before, after = zip(*ranks, strict=True)
        return MergedBlock(
            name=name, layers=len(ranks), ranks_before=(min(before), max(before)), ranks_after=(min(after), max(after)),
            norm=math.sqrt(energy[n]), energy=energy[n] / whole if whole > 0 else None,
            kept=tuple(float(products[i, n]) / energy[i] if energy[i] else None for i in range(n)),
            cut=min(1.0, energy[n] / uncut) if uncut > 0 else 1.0,
            overlaps=tuple(overlap(float(products[i, j]), energy[i], energy[j]) for i, j in combinations(range(n), 2)),
        )  # fmt: skip


def overlap(product: float, first: float, second: float) -> float:
    """How much two changes have in common, 0 to 1, by their inner product and their squared norms."""
    return min(1.0, product**2 / (first * second)) if first > 0 and second > 0 else 0.0
