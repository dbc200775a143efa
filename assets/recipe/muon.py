"""Muon for weights of any shape: momentum, then the nearest semi-orthogonal matrix (Jordan et al. 2024).

`torch.optim.Muon` takes matrices alone; here a convolution counts as the matrix [out, in * k * k]. Four iterations,
each with its own polynomial (Amsel et al. 2025), replace Jordan's five.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Parameter

from lora_compose.compose.support.precision import cpu_has_bf16
from recipe.ranks import add_up, rank, ranks

POLYNOMIALS = (
    (8.0660, -22.0342, 15.1010),
    (3.9043, -2.6904, 0.4702),
    (3.4407, -2.3910, 0.4406),
    (2.5177, -1.7466, 0.3792),
)
"""a, b, c of a x + b x^3 + c x^5, one after the other: singular values of 0.003 to 1 become 0.75 to 1.25.

Each is made for values 4 % larger than those that it should get: beyond its range it grows steeply, and bf16 rounds.
"""


def orthogonalised(matrix: Tensor) -> Tensor:
    """Nearly the closest matrix whose singular values are one, by Newton-Schulz iterations; bf16 is enough."""
    x = matrix.bfloat16() if cpu_has_bf16() else matrix
    x = x / (1.02 * x.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for a, b, c in POLYNOMIALS:
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """The optimizer.

    Args:
        params: Weights with two or more dimensions.
        lr: Spectral norm of a step.
        momentum: Of the gradients; the update looks ahead (Nesterov).
        weight_decay: Decoupled.
    """

    def __init__(
        self, params: Iterable[Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step along the orthogonalised momentum; processes that train together share that work."""
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            updates = [
                self._update(weight, group["momentum"], mine=number % ranks() == rank())
                for number, weight in enumerate(weights)
            ]
            add_up(updates)
            for weight, update in zip(weights, updates, strict=True):
                rows, columns = update.shape
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update.view_as(weight), alpha=-group["lr"] * max(1, rows / columns) ** 0.5)

    def _update(self, weight: Tensor, momentum: float, mine: bool) -> Tensor:
        """The update of a weight as a matrix; zeros where another process computes it."""
        assert weight.grad is not None
        average = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
        average.lerp_(weight.grad, 1 - momentum)
        matrix = weight.grad.lerp(average, momentum).flatten(1)
        return orthogonalised(matrix) if mine else torch.zeros_like(matrix)
