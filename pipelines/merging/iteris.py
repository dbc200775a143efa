"""IterIS (arXiv 2411.15231): least squares on the inputs of each LoRA, repeated with the inputs of the merged model.

With X_k the inputs of a layer while LoRA k alone acts, and Y_k those of the same layer in the merged model, a layer's
change W minimises

    sum_k c_k |W Y_k - W_k X_k|^2,   c_k = |W_k|^2 / |W_k X_k|^2

In the first round Y is X. Every further round solves it again with the Y of the last, since what a layer reads depends
on what those before it were merged to.

Four deviations. W keeps the rows of the A's, W = (B R) A, so that all products are those of `Moments` and the result is
an ordinary LoRA of all ranks; R is solved for orthonormal rows, as in `ssr.py`. The pull, ridge |sum_k c_k G_k| with
G_k = A Y_k (A Y_k)^T, leads to the plain sum (R = I) and not to the mean of the LoRAs. c_k has the changes, not the
whole weights, which moments do not hold. And Y_k is read from the merged model at every step of LoRA k's own image, so
that X_k and Y_k belong to the same latents; each model of a pipeline is compared on its own inputs.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from lora_compose.attention.lora_bank import LoraFactors
from lora_compose.pipelines.merging.factors import concatenated, orthonormal_rows
from lora_compose.pipelines.merging.merger import Changes, MergeLayer, Merger, Moments, check_positive


@dataclass(frozen=True)
class IterIs(Merger):
    """IterIS.

    Attributes:
        rounds: How often the least squares are solved. The authors' code has 6 to 24 for language models; every round
            but the first runs the model twice for each step.
        ridge: The pull to the plain sum, as a fraction of the norm of the inputs' moments.
    """

    needs_model = True
    rounds: int = 3
    ridge: float = 1e-2

    def __post_init__(self) -> None:
        """Checks the settings."""
        check_positive("rounds", self.rounds, int)
        check_positive("ridge", self.ridge)

    def start(self, layers: Iterable[Changes]) -> MergeLayer:
        """Solves each layer independently."""
        return lambda changes, moments: (
            concatenated(changes) if moments is None else iteris(changes, moments, self.ridge)
        )


def iteris(changes: Changes, moments: Moments, ridge: float) -> LoraFactors:
    """One round: the changes with R between their factors. Only LoRAs that change the layer take part."""
    present = [k for k, change in enumerate(changes) if change.rank]
    parts = [orthonormal_rows(changes[k]) for k in present]
    white = torch.block_diag(*(part.white for part in parts))
    alone, merged, cross = (
        white @ moment[present].double() @ white.T for moment in (moments.alone, moments.merged, moments.cross)
    )
    wanted, read, start = torch.zeros_like(white @ white.T), torch.zeros_like(white @ white.T), 0
    for k, part in enumerate(parts):
        own = slice(start, start := start + part.down.shape[0])
        sent = ((part.up.T @ part.up) * alone[k, own, own]).sum()  # the mean of |W_k x|^2
        balance = part.up.square().sum() / sent if sent > 0 else sent
        wanted[own] += balance * cross[k, own]
        read += balance * merged[k]
    pull = (ridge * read.norm() + torch.finfo(read.dtype).tiny) * torch.eye(len(read), dtype=read.dtype)
    router = torch.linalg.solve(read + pull, wanted + pull, left=False)
    up, down = torch.cat([part.up for part in parts], dim=1), torch.cat([part.down for part in parts])
    return LoraFactors(down, up @ router)
