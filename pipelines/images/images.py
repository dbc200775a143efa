"""Reads start images given as PIL images, arrays, tensors or paths."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lora_compose.pipelines.scene.mask_images import PIXEL_LIMIT, bounded, open_image


def read_images(given: Any, latent_channels: int | None = None) -> list[Image.Image] | Tensor:
    """The images that a call starts from.

    Args:
        given: A PIL image, a path, an array of 8 bits [height, width, 3] or of 0 to 1, a tensor of 0 to 1 [3, height,
            width], latents [images, channels, height, width], or a list of these; also batches of arrays and tensors.
            Values of -1 to 1 are images, too, as they once were for diffusers, which warns.
        latent_channels: Channels of latents; None takes no latents.

    Returns:
        PIL images in RGB, all of one size, or a tensor. Shape: [images, channels, height, width].

    Raises:
        ValueError: For what cannot be an image, and images of several sizes.
    """
    if not isinstance(given, list | tuple):
        found = _image(given, latent_channels)
        return [found] if isinstance(found, Image.Image) else found
    if not given:
        raise ValueError("image is an empty list; give one image, or one for each prompt")
    every = [_image(one, latent_channels) for one in given]
    images = [one for one in every if isinstance(one, Image.Image)]
    tensors = [one for one in every if isinstance(one, Tensor)]
    if images and tensors:
        raise ValueError("image is a mixture of kinds; give PIL images, paths and 8-bit arrays, or tensors of 0 to 1")
    sizes = {image.size for image in images} or {(one.shape[-1], one.shape[-2]) for one in tensors}
    if len(sizes) > 1:
        listed = ", ".join(f"{width} x {height}" for width, height in sorted(sizes))
        raise ValueError(f"the images have different sizes ({listed}); resize them to one")
    return images or torch.cat(tensors)


def _image(given: Any, latent_channels: int | None) -> Image.Image | Tensor:
    if isinstance(given, str | Path):
        return _rgb(open_image(given, "image"))
    if isinstance(given, Image.Image):
        return _rgb(bounded(given, "image"))
    if isinstance(given, np.ndarray):
        return _of_array(given)
    if isinstance(given, Tensor):
        return _of_tensor(given, latent_channels)
    raise ValueError(
        f"image is a {type(given).__name__}; expected a PIL image, a path, an array, a tensor, or a list of these"
    )


def _rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")


def _of_array(given: np.ndarray) -> Image.Image | Tensor:
    if given.dtype == np.uint8 and given.ndim in (2, 3) and given.size:
        if given.ndim == 2 or given.shape[2] in (3, 4):
            return _rgb(bounded(Image.fromarray(given), "image"))
        if given.shape[2] == 1:
            return _rgb(bounded(Image.fromarray(given[..., 0]), "image"))
    if given.dtype.kind != "f" or given.ndim not in (3, 4) or given.shape[-1] != 3:
        raise ValueError(
            f"image is an array of {given.dtype} with the shape {list(given.shape)}; expected 8 bits [height, width, "
            "3], or floats of 0 to 1 [height, width, 3] or [images, height, width, 3]"
        )
    return _of_tensor(torch.from_numpy(np.moveaxis(given, -1, -3).astype(np.float32)))


def _of_tensor(given: Tensor, latent_channels: int | None = None) -> Tensor:
    tensor = given[None] if given.dim() == 3 else given
    if not given.is_floating_point() or tensor.dim() != 4 or tensor.shape[1] not in (3, latent_channels):
        latents = "" if latent_channels is None else f", or latents [images, {latent_channels}, height, width]"
        raise ValueError(
            f"image is a tensor of {given.dtype} with the shape {list(given.shape)}; expected floats of 0 to 1 [3, "
            f"height, width] or [images, 3, height, width]{latents}"
        )
    if not 0 < tensor.numel() <= 3 * PIXEL_LIMIT:
        raise ValueError(f"image has the shape {list(given.shape)}; expected at most {PIXEL_LIMIT} pixels in all")
    if not tensor.isfinite().all():
        raise ValueError("image has values that are NaN or infinite")
    low, high = tensor.min(), tensor.max()
    if tensor.shape[1] == 3 and (low < -1 or high > 1):
        raise ValueError(f"image has values from {low:.3g} to {high:.3g}; floats are expected between 0 and 1")
    return tensor
