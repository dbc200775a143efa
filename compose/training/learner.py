"""From a batch to its losses: everything that a training step computes, in one module."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor, nn

from lora_compose.compose.training.alignment import Alignment
from lora_compose.compose.training.focus import Focus


class Batch(NamedTuple):
    """Rows of the concept first, then rows of its class.

    Attributes:
        latents: Shape: [rows, channels, height, width].
        noise: As `latents`.
        timesteps: Shape: [rows].
        text: Features of the captions. Shape: [rows, tokens, channels].
        mask: 1 at triggers, 0 everywhere in rows of the class. Shape: [rows, tokens, 1].
        added: What SDXL takes beside the text, by name; empty for others.
        weights: How much every pair of words counts in the alignment. Shape: [words].
        own: How many rows are of the concept.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    text: Tensor
    mask: Tensor
    added: dict[str, Tensor]
    weights: Tensor
    own: int


class Losses(NamedTuple):
    """Of a batch: to be minimised, and what it is made of."""

    total: Tensor
    concept: Tensor
    prior: Tensor
    alignment: Tensor


@dataclass(frozen=True)
class Weights:
    """How losses are added up.

    Attributes:
        prior: Of class images.
        alignment: Of token alignment.
        min_snr: Gamma of min-SNR weighting; None is none.
    """

    prior: float = 1.0
    alignment: float = 0.0
    min_snr: float | None = None


class Learner(nn.Module):
    """A UNet with its losses.

    Args:
        unet: With an adapter.
        schedule: How noise is added; says also what the model predicts.
        weights: How losses are added up.
        focus: Where the token mask is set; None for an adapter without mask.
        alignment: The alignment loss; None for none.
    """

    def __init__(
        self,
        unet: nn.Module,
        schedule: DDPMScheduler,
        weights: Weights,
        focus: Focus | None = None,
        alignment: Alignment | None = None,
    ) -> None:
        super().__init__()
        self.unet = unet
        self.schedule: Any = schedule
        self.weights = weights
        self.focus, self.alignment = focus, alignment
        if self.schedule.config.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"this model predicts {self.schedule.config.prediction_type}; expected epsilon or velocity"
            )

    def forward(self, batch: Batch) -> Losses:
        """The losses of a batch; concept and class are parted before any of them is taken."""
        if self.focus is not None:
            self.focus.mask = batch.mask
        noisy = self.schedule.add_noise(batch.latents, batch.noise, batch.timesteps)
        predicted = self.unet(
            noisy, batch.timesteps, batch.text, added_cond_kwargs=batch.added or None, return_dict=False
        )[0]
        errors = (predicted.float() - self._target(batch)).square().mean((1, 2, 3)) * self._row_weights(batch.timesteps)
        concept, prior = errors[: batch.own].mean(), errors[batch.own :]
        prior = prior.mean() if len(prior) else errors.new_zeros(())
        alignment = errors.new_zeros(()) if self.alignment is None else self.alignment.loss(batch.weights)
        return Losses(
            concept + self.weights.prior * prior + self.weights.alignment * alignment, concept, prior, alignment
        )

    def _target(self, batch: Batch) -> Tensor:
        if self.schedule.config.prediction_type == "v_prediction":
            return self.schedule.get_velocity(batch.latents, batch.noise, batch.timesteps)
        return batch.noise

    def _row_weights(self, timesteps: Tensor) -> Tensor:
        """Min-SNR weighting (Hang et al., arXiv 2303.09556): min(SNR, gamma) / SNR, and / (SNR + 1) for velocities."""
        if self.weights.min_snr is None:
            return torch.ones_like(timesteps, dtype=torch.float32)
        snr = compute_snr(self.schedule, timesteps).float()
        most = snr.clamp(max=self.weights.min_snr)
        return most / (snr + 1 if self.schedule.config.prediction_type == "v_prediction" else snr)
