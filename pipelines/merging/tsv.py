"""TSV-Merge (arXiv 2412.00081): singular vectors of all changes made orthogonal to each other.

Singular vectors of one LoRA are orthonormal, those of several are not, and where they are alike their changes
interfere. With U = [U_1 | U_2 | ...], V = [V_1 | V_2 | ...] and S all singular values, the result is U' S V'^T, where
U' and V' are the nearest matrices with orthonormal columns: P Q^T of the decomposition P D Q^T (Procrustes). The paper
keeps 1/n of the ranks of each of n whole differences; LoRAs have few, and all are kept.

Where two LoRAs have the same vectors, the nearest such matrix is not unique; the undetermined part is left out (a
partial isometry). The same LoRA twice then gives that LoRA once.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_compose.attention.lora_bank import LoraFactors
from lora_compose.pipelines.formats.change import TINY
from lora_compose.pipelines.merging.factors import spectrum
from lora_compose.pipelines.merging.merger import Changes, MergeLayer, Merger


@dataclass(frozen=True)
class Tsv(Merger):
    """TSV-Merge. No settings."""

    def start(self, layers: Iterable[Changes]) -> MergeLayer:
        """Merges each layer independently."""
        return lambda changes, moments: tsv(changes)


def tsv(changes: Changes) -> LoraFactors:
    """The singular values of all changes, on singular vectors that are orthogonal to each other."""
    spectra = [spectrum(change) for change in changes]
    root = torch.cat([change.values for change in spectra]).sqrt()
    up = nearest_isometry(torch.cat([change.u for change in spectra], dim=1))
    down = nearest_isometry(torch.cat([change.v for change in spectra], dim=1))
    return LoraFactors(root[:, None] * down.T, up * root)


def nearest_isometry(columns: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns, or the part of it that is determined."""
    p, d, qh = torch.linalg.svd(columns, full_matrices=False)
    kept = d > TINY  # columns have length 1
    return p[:, kept] @ qh[kept]
