"""Images in a VAE for videos, as videos of one frame, with each latent channel normalised (Qwen-Image's VAE)."""

from typing import Any

import torch
from torch import Tensor


def latents_of_image(vae: Any, pixels: Tensor) -> Tensor:
    """Normalised latents of images, without the frame axis. Shape: [images, channels, height, width]."""
    means = vae.encode(pixels[:, :, None].to(vae.dtype)).latent_dist.mode()
    mean, std = channel_norm(vae, means)
    return ((means - mean) / std)[:, :, 0]


def channel_norm(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each latent channel. Shape: [1, channels, 1, 1, 1]."""
    mean, std = (
        torch.tensor(numbers).to(like).view(1, -1, 1, 1, 1)
        for numbers in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std
