"""LoRA Soups' CAT (arXiv 2410.13025): one number per LoRA and layer, A's and B's concatenated.

The paper trains the numbers on a mix of the tasks. Here they have a closed form. With X_k the inputs of a layer while
LoRA k alone acts, they minimise sum_k |sum_i a_i dW_i X_k - dW_k X_k|^2, so that for the inputs of each LoRA the layer
does what that LoRA alone would do:

    (H + l I) a = g + l,   H_ij = sum_k <dW_i X_k, dW_j X_k>,   g_i = sum_k <dW_i X_k, dW_k X_k>

l pulls to 1, the plain sum, where the inputs carry no information. The products need small matrices only
(`Moments`): <dW_i X, dW_j X> = sum((B_i^T B_j) * (A_i X)(A_j X)^T).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_compose.attention.lora_bank import LoraFactors
from lora_compose.pipelines.merging.factors import by_change, concatenated, matrices, scaled
from lora_compose.pipelines.merging.merger import Changes, MergeLayer, Merger, Moments, check_positive


@dataclass(frozen=True)
class Soups(Merger):
    """LoRA Soups with weights by least squares.

    Attributes:
        ridge: l, the pull to the plain sum, as a fraction of the mean of H's diagonal.
        largest: Upper bound of the numbers; the lower bound is 0.
    """

    needs_model = True
    ridge: float = 1e-3
    largest: float = 1.5

    def __post_init__(self) -> None:
        """Checks the settings."""
        check_positive("ridge", self.ridge)
        check_positive("largest", self.largest)

    def start(self, layers: Iterable[Changes]) -> MergeLayer:
        """Merges each layer independently."""

        def merge(changes: Changes, moments: Moments | None) -> LoraFactors:
            if moments is None:
                return concatenated(changes)
            numbers = best_numbers(changes, moments, self.ridge).clamp(0, self.largest).tolist()
            return concatenated([scaled(change, a) for change, a in zip(changes, numbers, strict=True)])

        return merge


def best_numbers(changes: Changes, moments: Moments, ridge: float) -> Tensor:
    """The numbers a, not clamped; 1 for LoRAs that do not change the layer. Shape: [LoRAs]."""
    up = torch.cat([matrices(change)[0] for change in changes], dim=1)
    # For each run, the inner products of the LoRAs' contributions to the layer's output. Shape: [runs, LoRAs, LoRAs].
    products = by_change((up.T @ up) * moments.alone.double(), changes)
    taking_part = torch.tensor([change.rank > 0 for change in changes])
    products = products * taking_part[:, None, None]
    h = products.sum(0)
    g = torch.einsum("kik->i", products)
    pull = ridge * h.trace() / max(1, int(taking_part.sum())) + torch.finfo(h.dtype).tiny
    return torch.linalg.solve(h + pull * torch.eye(len(changes), dtype=h.dtype), g + pull)
