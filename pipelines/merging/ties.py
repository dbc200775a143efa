"""TIES (arXiv 2306.01708) in the space that the LoRAs share, as in KnOTS (arXiv 2410.19735).

TIES keeps the largest entries of each change, elects a sign for each entry by their sum, and takes the mean of those
that agree. On whole weights the result has full rank, and on A's and B's apart it means nothing. KnOTS represents all
changes in one orthonormal basis of their outputs, [dW_1 | dW_2 | ...] = U [C_1 | C_2 | ...], and lets TIES act on the
C_i: the result U C has no more rank than all LoRAs together.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from lora_compose.attention.lora_bank import LoraFactors
from lora_compose.pipelines.formats.change import TINY
from lora_compose.pipelines.merging.factors import coefficients, left_space, spectrum
from lora_compose.pipelines.merging.merger import Changes, MergeLayer, Merger, check_share


@dataclass(frozen=True)
class Ties(Merger):
    """KnOTS-TIES.

    Attributes:
        density: The share of each LoRA's largest coefficients that is kept; 0.2 in the TIES paper.
    """

    density: float = 0.2

    def __post_init__(self) -> None:
        """Checks the settings."""
        check_share("density", self.density)

    def start(self, layers: Iterable[Changes]) -> MergeLayer:
        """Merges each layer independently."""
        return lambda changes, moments: ties(changes, self.density)


def ties(changes: Changes, density: float) -> LoraFactors:
    """Trims each change, elects signs and averages the entries that agree, in the changes' common basis.

    A LoRA that does not change the layer has zeros, which have no sign and do not count in the mean.
    """
    # Imported here, so that other mergers are there without PEFT, e.g. in ComfyUI.
    from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge, magnitude_based_pruning

    spectra = [spectrum(change) for change in changes]
    space = left_space(spectra)
    entries = torch.stack([coefficients(space, change) for change in spectra])
    if entries.numel():
        entries[entries.abs() < entries.abs().max() * TINY] = 0  # rounding has no sign, and counts in no mean
    kept = torch.stack([magnitude_based_pruning(matrix, density) for matrix in entries])
    return LoraFactors(disjoint_merge(kept, calculate_majority_sign_mask(kept, method="total")), space)
