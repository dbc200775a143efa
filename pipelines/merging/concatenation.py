"""Concatenation, the exact sum; and the best approximation of it by fewer ranks."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from lora_compose.attention.lora_bank import LoraFactors
from lora_compose.pipelines.merging.factors import concatenated, spectrum
from lora_compose.pipelines.merging.merger import Changes, MergeLayer, Merger


@dataclass(frozen=True)
class Cat(Merger):
    """The exact sum of the changes: all ranks side by side. There are no settings."""

    resolves = False

    def start(self, layers: Iterable[Changes]) -> MergeLayer:
        """Takes each layer for itself."""
        return lambda changes, moments: concatenated(changes)


@dataclass(frozen=True)
class Svd(Merger):
    """The sum by its singular values, without ranks that add nothing, to be cut. There are no settings."""

    resolves = False

    def start(self, layers: Iterable[Changes]) -> MergeLayer:
        """Takes each layer for itself."""
        return _compact


def _compact(changes: Changes, moments: Tensor | None) -> LoraFactors:
    return spectrum(concatenated(changes)).factors()
