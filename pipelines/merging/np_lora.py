"""NP-LoRA (arXiv 2511.11051): removes from the subject the input directions that the style uses.

    dW = dW_subject (I - m / (1 + m) V V^T) + dW_style

V are the main right singular vectors of the style, m the strength of the projection (soft; infinity is a projection to
the null space). Only the subject's A changes.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from lora_compose.attention.lora_bank import LoraFactors
from lora_compose.pipelines.merging.factors import concatenated, matrices, spectrum
from lora_compose.pipelines.merging.merger import Changes, MergeLayer, Merger, Moments, check_positive, check_share


@dataclass(frozen=True)
class NpLora(Merger):
    """NP-LoRA, for a subject and a style in this order.

    Attributes:
        strength: m; the subject loses m / (1 + m) of its part in the style's directions.
        energy: The style's main directions are those that carry this share of its energy, layer by layer.
    """

    pair = True
    strength: float = 0.5
    energy: float = 0.9

    def __post_init__(self) -> None:
        """Checks the settings."""
        check_positive("strength", self.strength)
        check_share("energy", self.energy)

    def start(self, layers: Iterable[Changes]) -> MergeLayer:
        """Merges each layer independently."""

        def merge(changes: Changes, moments: Moments | None) -> LoraFactors:
            subject, style = changes
            return np_lora(subject, style, self.strength, self.energy)

        return merge


def np_lora(subject: LoraFactors, style: LoraFactors, strength: float, energy: float) -> LoraFactors:
    """The subject, projected away from the style's main input directions, plus the style."""
    main = spectrum(style)
    v = main.v[:, : main_directions(main.values, energy)]
    up, down = matrices(subject)
    return concatenated([LoraFactors(down - strength / (1 + strength) * (down @ v) @ v.T, up), style])


def main_directions(values: torch.Tensor, energy: float) -> int:
    """How many of the singular values, the largest first, are needed for a share of their energy."""
    if not len(values):
        return 0
    carried = (values**2).cumsum(0) / (values**2).sum()
    return min(len(values), int((carried < energy - 1e-9).sum()) + 1)
