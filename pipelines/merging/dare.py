"""DARE (arXiv 2311.03099): drops entries of each change at random, and divides the rest by the share that is kept.

The expected value of each entry is the sum of the changes. The entries are those of the changes in a common basis of
their outputs, as in `ties`, so that the result has no more rank than all LoRAs together; on whole weights it would have
full rank.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from lora_compose.attention.lora_bank import LoraFactors
from lora_compose.pipelines.merging.factors import coefficients, left_space, spectrum
from lora_compose.pipelines.merging.merger import Changes, MergeLayer, Merger, check_share


@dataclass(frozen=True)
class Dare(Merger):
    """DARE on the changes.

    Attributes:
        density: The share of the entries that is kept.
        seed: Seed of the random choice.
    """

    density: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the settings."""
        check_share("density", self.density)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed must be a whole number of at least 0, not {self.seed!r}")

    def start(self, layers: Iterable[Changes]) -> MergeLayer:
        """Merges the layers in order, with one random generator."""
        generator = torch.Generator().manual_seed(self.seed)
        return lambda changes, moments: dare(changes, self.density, generator)


def dare(changes: Changes, density: float, generator: torch.Generator) -> LoraFactors:
    """The sum of the changes, each with a random share of its entries, scaled up by 1 / density."""
    spectra = [spectrum(change) for change in changes]
    space = left_space(spectra)
    merged = 0.0
    for addend in spectra:
        entries = coefficients(space, addend)
        kept = torch.rand(entries.shape, generator=generator, dtype=entries.dtype) < density
        merged = merged + entries * kept / density
    return LoraFactors(torch.as_tensor(merged), space)
