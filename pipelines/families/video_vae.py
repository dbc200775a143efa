"""Images in a VAE for videos, as videos of one frame, with each latent channel normalised (Qwen-Image's VAE)."""

from typing import Any

import torch
from torch import Tensor

from lora_compose.pipelines.families.flow_matching import FlowMatchingPipeline


class VideoVaePipeline(FlowMatchingPipeline):
    """A composing pipeline with Qwen-Image's VAE."""

    def latents_of(self, pixels: Tensor) -> Tensor:
        """As `FlowMatchingPipeline.latents_of`; each channel is normalised apart."""
        means = self.vae.encode(pixels[:, :, None].to(self.vae.dtype)).latent_dist.mode()
        mean, std = self._channel_norm(means)
        return ((means - mean) / std)[:, :, 0]

    def _channel_norm(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each latent channel. Shape: [1, channels, 1, 1, 1]."""
        config: Any = self.vae.config
        mean, std = (
            torch.tensor(numbers).to(like).view(1, -1, 1, 1, 1) for numbers in (config.latents_mean, config.latents_std)
        )
        return mean, std

    def _scaled(self, latents: Tensor) -> Tensor:
        latents = latents[:, :, None].to(self.vae.dtype)
        mean, std = self._channel_norm(latents)
        return latents / (1.0 / std) + mean  # rounded as in diffusers

    def _postprocess(self, image: Tensor, output_type: str, **options: Any) -> Any:
        return super()._postprocess(image[:, :, 0], output_type, **options)
