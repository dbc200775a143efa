"""FLUX.2's VAE, whose latents are normalised as patches."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from lora_compose.attention.backbones.joint import PATCH
from lora_compose.pipelines.families.flow_matching import FlowMatchingPipeline, Shape


class Flux2VaePipeline(FlowMatchingPipeline):
    """A composing pipeline with FLUX.2's VAE; diffusers has its latents with patches as channels."""

    def latents_of(self, pixels: Tensor) -> Tensor:
        """As `FlowMatchingPipeline.latents_of`; patches are normalised as the VAE's last layer says."""
        mean, std = self._norm(pixels.to(self.vae.dtype))
        means = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist.mode()
        return pixel_shuffle((pixel_unshuffle(means, PATCH) - mean) / std, PATCH)

    def _scaled(self, latents: Tensor) -> Tensor:
        patches = pixel_unshuffle(latents, PATCH)
        mean, std = self._norm(patches)
        return pixel_shuffle(patches * std + mean, PATCH)

    def _norm(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the latents' patches."""
        norm: Any = self.vae.bn
        mean, variance = (numbers.view(1, -1, 1, 1).to(like) for numbers in (norm.running_mean, norm.running_var))
        return mean, torch.sqrt(variance + self.vae.config.batch_norm_eps)

    def _other_shapes(self, shape: Shape) -> Sequence[Shape]:
        return [self._drawn(shape)]

    def _drawn(self, shape: Shape) -> Shape:
        rows, channels, height, width = shape
        return rows, channels * PATCH**2, height // PATCH, width // PATCH
