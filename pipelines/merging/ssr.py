"""SSR-Merge (arXiv 2606.10617): a small matrix between the A's and B's routes each LoRA's inputs to its own B.

With A = [A_1; A_2; ...], B = [B_1 | B_2 | ...] and Z_k = A X_k for the inputs X_k of a layer while LoRA k alone acts,

    R = Q (G + l I)^-1,   G = mean_k Z_k Z_k^T,   Q = mean_k E_k (A_k X_k) Z_k^T   (E_k: the rows of LoRA k)

minimises sum_k |R Z_k - E_k A_k X_k|^2, and the result is (B R) A: an ordinary LoRA of all ranks. It separates LoRAs by
their inputs, not by positions in the image.

Two deviations. The A_i are replaced by orthonormal rows first (and the B_i changed accordingly), so that l weighs all
directions alike whatever the factors; and l pulls to the plain sum (Q + l I) and not to nothing, so that directions
that no input has are left alone, and a single LoRA stays exactly as it is. As in the authors' code, only LoRAs that
change a layer take part there.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from lora_compose.attention.lora_bank import LoraFactors
from lora_compose.pipelines.merging.factors import concatenated, orthonormal_rows
from lora_compose.pipelines.merging.merger import Changes, MergeLayer, Merger, Moments, check_positive


@dataclass(frozen=True)
class Ssr(Merger):
    """SSR-Merge.

    Attributes:
        ridge: l, the pull to the plain sum. The authors' code has 1e-4 for the short rows of the A's. For orthonormal
            rows that is too little: the matrix R grows until images break.
    """

    needs_model = True
    ridge: float = 1e-2

    def __post_init__(self) -> None:
        """Checks the settings."""
        check_positive("ridge", self.ridge)

    def start(self, layers: Iterable[Changes]) -> MergeLayer:
        """Merges each layer independently."""
        return lambda changes, moments: concatenated(changes) if moments is None else ssr(changes, moments, self.ridge)


def ssr(changes: Changes, moments: Moments, ridge: float) -> LoraFactors:
    """The changes with R between their factors."""
    present = [k for k, change in enumerate(changes) if change.rank]
    whitened = [orthonormal_rows(changes[k]) for k in present]
    white = torch.block_diag(*(factors.white for factors in whitened))
    z = white @ moments.alone[present].double() @ white.T
    q, start = torch.zeros_like(z[0]), 0
    for k, factors in enumerate(whitened):
        rows = slice(start, start := start + factors.down.shape[0])
        q[rows] = z[k, rows] / len(present)
    pull = ridge * torch.eye(len(q), dtype=q.dtype)
    router = torch.linalg.solve(z.mean(0) + pull, q + pull, left=False)
    up, down = torch.cat([factors.up for factors in whitened], dim=1), torch.cat([factors.down for factors in whitened])
    return LoraFactors(down, up @ router)
