"""Concatenation, the exact sum; and SVD, its best approximation of a lower rank."""

from collections.abc import Iterable
from dataclasses import dataclass

from lora_compose.attention.lora_bank import LoraFactors
from lora_compose.pipelines.merging.factors import concatenated, spectrum
from lora_compose.pipelines.merging.merger import Changes, MergeLayer, Merger, Moments


@dataclass(frozen=True)
class Cat(Merger):
    """The exact sum of the changes: all ranks concatenated. No settings."""

    resolves = False

    def start(self, layers: Iterable[Changes]) -> MergeLayer:
        """Merges each layer independently."""
        return lambda changes, moments: concatenated(changes)


@dataclass(frozen=True)
class Svd(Merger):
    """The sum as a singular value decomposition without empty ranks, so that it can be cut. No settings."""

    resolves = False

    def start(self, layers: Iterable[Changes]) -> MergeLayer:
        """Merges each layer independently."""
        return _compact


def _compact(changes: Changes, moments: Moments | None) -> LoraFactors:
    return spectrum(concatenated(changes)).factors()
