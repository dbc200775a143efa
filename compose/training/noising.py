"""How training images are noised, what the network predicts of them, and how errors are weighted."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from diffusers.training_utils import compute_snr
from torch import Tensor, nn

from lora_compose.attention import backbone_of
from lora_compose.attention.backbones.joint import PATCH
from lora_compose.pipelines.families.flow_matching import FlowMatchingPipeline


class Noising(Protocol):
    """How images are noised, and what the network predicts of them."""

    def draw(self, random: torch.Generator) -> float:
        """A time at which a row is noised."""
        ...

    def noisy(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Latents at some times. Shapes: [rows, channels, height, width] and [rows]."""
        ...

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """The target of the prediction."""
        ...

    def predict(self, noisy: Tensor, times: Tensor, text: Tensor, added: Mapping[str, Tensor]) -> Tensor:
        """A forward pass of the network."""
        ...

    def weights(self, times: Tensor, min_snr: float | None) -> Tensor:
        """How much each row counts. Shape: [rows]."""
        ...


HIGH_NOISE = 0.65
"""The part of the timesteps below those at which it is decided what is where, and in which shape."""


class Diffusion:
    """Noise by a schedule, of which the network predicts epsilon or, if configured so, the velocity.

    Args:
        high_noise: The share of the rows whose timestep is one of the noisiest, above `HIGH_NOISE` of all.

    Raises:
        ValueError: If the model predicts something else.
    """

    def __init__(self, network: nn.Module, schedule: Any, high_noise: float = 0.0) -> None:
        self.network, self.schedule, self.high_noise = network, schedule, high_noise
        if schedule.config.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"this model predicts {schedule.config.prediction_type}; expected epsilon or velocity")

    def draw(self, random: torch.Generator) -> int:
        """A timestep, uniformly distributed among all or among the noisiest ones."""
        count = self.schedule.config.num_train_timesteps
        noisy = self.high_noise > 0 and bool(torch.rand(1, generator=random) < self.high_noise)
        return int(torch.randint(round(HIGH_NOISE * count) if noisy else 0, count, (1,), generator=random))

    def noisy(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Latents with noise, by the noise schedule."""
        return self.schedule.add_noise(latents, noise, times)

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Epsilon or the velocity."""
        if self.schedule.config.prediction_type == "v_prediction":
            return self.schedule.get_velocity(latents, noise, times)
        return noise

    def predict(self, noisy: Tensor, times: Tensor, text: Tensor, added: Mapping[str, Tensor]) -> Tensor:
        """A forward pass of the network."""
        return self.network(noisy, times, text, added_cond_kwargs=dict(added) or None, return_dict=False)[0]

    def weights(self, times: Tensor, min_snr: float | None) -> Tensor:
        """Min-SNR weighting (Hang et al., arXiv 2303.09556): min(SNR, gamma) / SNR, and / (SNR + 1) for velocities."""
        if min_snr is None:
            return torch.ones_like(times, dtype=torch.float32)
        snr: Any = compute_snr(self.schedule, times)
        most = snr.float().clamp(max=min_snr)
        return most / (snr + 1 if self.schedule.config.prediction_type == "v_prediction" else snr)


class Flow:
    """Flow matching: latents on a line from image to noise, of which a transformer predicts the direction.

    x_s = (1 - s) x + s n        v = n - x        s = sigmoid(z), z ~ N(0, 1)     (Esser et al., arXiv 2403.03206)

    The transformer is that of a pipeline.

    Args:
        high_noise: The share of the rows whose time is one of the noisiest, uniform above `HIGH_NOISE`.
        guidance: The scale that models are given of which it is an input; 1 is none.
    """

    def __init__(self, pipe: FlowMatchingPipeline, high_noise: float = 0.0, guidance: float = 1.0) -> None:
        self.backbone, self._pipe, self.high_noise = backbone_of(pipe.transformer), pipe, high_noise
        self.guidance = guidance

    def draw(self, random: torch.Generator) -> float:
        """A timestep, 0 to 1000; most are in the middle, or among the noisiest ones."""
        if self.high_noise > 0 and float(torch.rand(1, generator=random)) < self.high_noise:
            return (HIGH_NOISE + (1 - HIGH_NOISE) * float(torch.rand(1, generator=random))) * 1000
        return float(torch.randn(1, generator=random).sigmoid()) * 1000

    def noisy(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """A point on the line."""
        return latents.lerp(noise, times.view(-1, 1, 1, 1) / 1000)

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """The target of the noising: the direction of the line."""
        return noise - latents

    def predict(self, noisy: Tensor, times: Tensor, text: Tensor, added: Mapping[str, Tensor]) -> Tensor:
        """A forward pass by the family's backbone.

        "reference" of `added` are tokens of reference images, each as large as the training image. "read" is how many
        tokens of each text the model sees; it has no masks, so texts of one length go through it together.
        """
        if "read" not in added:
            return self._pass(noisy, times, text, added)
        order, passes = [], []
        for length in added["read"].unique().tolist():
            rows = (added["read"] == length).nonzero()[:, 0]
            given = {name: value[rows] for name, value in added.items()}
            passes.append(self._pass(noisy[rows], times[rows], text[rows, :length], given))
            order.append(rows)
        return torch.cat(passes)[torch.cat(order).argsort()]

    def _pass(self, noisy: Tensor, times: Tensor, text: Tensor, added: Mapping[str, Tensor]) -> Tensor:
        inputs: dict[str, Any] = dict(self._pipe.guidance_input(self.guidance, len(noisy), noisy.device))
        if "reference" in added:
            height, width = (side // PATCH for side in noisy.shape[-2:])
            tokens = added["reference"]
            grids = [(height, width)] * (tokens.shape[1] // (height * width))
            inputs |= {"reference": tokens, "reference_grids": grids}
        return self.backbone.forward(noisy, times, text, added, **inputs)

    def weights(self, times: Tensor, min_snr: float | None) -> Tensor:
        """1 for all rows: the distribution of the times weights them already."""
        return torch.ones_like(times)
