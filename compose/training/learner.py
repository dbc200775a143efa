"""From a batch to its losses: everything that a training step computes, in one module."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_compose.compose.training.alignment import Alignment
from lora_compose.compose.training.focus import Focus
from lora_compose.compose.training.model import without_lora
from lora_compose.compose.training.noising import Noising


class Batch(NamedTuple):
    """Rows of the concept first, then rows of its class.

    Attributes:
        latents: Shape: [rows, channels, height, width].
        noise: Which the network is to tell from the image. As `latents`.
        input_noise: With which its input is noised; that noise, or a perturbation of it. As `latents`.
        times: At which they are noised. Shape: [rows].
        text: Features of the captions. Shape: [rows, tokens, channels].
        mask: 1 at triggers, 0 everywhere in rows of the class. Shape: [rows, tokens, 1].
        added: Further inputs of the network, by name.
        weights: How much every pair of words counts in the alignment. Shape: [words].
        own: How many rows are of the concept.
    """

    latents: Tensor
    noise: Tensor
    input_noise: Tensor
    times: Tensor
    text: Tensor
    mask: Tensor
    added: dict[str, Tensor]
    weights: Tensor
    own: int


class Losses(NamedTuple):
    """The losses of a batch: the sum that is minimised, and its parts."""

    total: Tensor
    concept: Tensor
    prior: Tensor
    alignment: Tensor


@dataclass(frozen=True)
class Weights:
    """How losses are added up: weights of the class and of token alignment, and gamma of min-SNR (None: none)."""

    prior: float = 1.0
    alignment: float = 0.0
    min_snr: float | None = None


class Learner(nn.Module):
    """A network with its losses; `focus` and `alignment` are None for an adapter without these.

    With `preserves` the target of rows of the class is not their noise but what the base model predicts of them.
    """

    def __init__(
        self,
        network: nn.Module,
        noising: Noising,
        weights: Weights,
        focus: Focus | None = None,
        alignment: Alignment | None = None,
        *,
        preserves: bool = False,
    ) -> None:
        super().__init__()
        self.network, self.noising = network, noising
        self.weights = weights
        self.focus, self.alignment = focus, alignment
        self.preserves = preserves

    def forward(self, batch: Batch) -> Losses:
        """The losses of a batch; concept and class are separated before any is computed."""
        if self.focus is not None:
            self.focus.mask = batch.mask if self.focus.in_training else torch.ones_like(batch.mask)
        noisy = self.noising.noisy(batch.latents, batch.input_noise, batch.times)
        target = self.noising.target(batch.latents, batch.noise, batch.times)
        if self.preserves:
            target = torch.cat([target[: batch.own], self._base(noisy, batch)])
        predicted = self.noising.predict(noisy, batch.times, batch.text, batch.added)
        weights = self.noising.weights(batch.times, self.weights.min_snr)
        errors = (predicted.float() - target).square().mean((1, 2, 3)) * weights
        concept, prior = errors[: batch.own].mean(), errors[batch.own :]
        prior = prior.mean() if len(prior) else errors.new_zeros(())
        alignment = errors.new_zeros(()) if self.alignment is None else self.alignment.loss(batch.weights)
        return Losses(
            concept + self.weights.prior * prior + self.weights.alignment * alignment, concept, prior, alignment
        )

    @torch.no_grad()
    def _base(self, noisy: Tensor, batch: Batch) -> Tensor:
        """What the base model predicts of the rows of the class."""
        rows = slice(batch.own, None)
        added = {name: value[rows] for name, value in batch.added.items()}
        with without_lora(self.network):
            return self.noising.predict(noisy[rows], batch.times[rows], batch.text[rows], added).float()
