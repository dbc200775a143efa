"""Reads start images given as PIL images, arrays, tensors or paths."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lora_compose.pipelines.scene.mask_images import PIXEL_LIMIT, bounded, on_white, open_image


def read_images(value: Any, latent_channels: int | None = None) -> list[Image.Image] | Tensor:
    """The images that a call starts from.

    Args:
        value: A PIL image, a path, an array of 8 bits [height, width, 3] or of 0 to 1, a tensor of 0 to 1 [3, height,
            width], latents [images, channels, height, width], or a list of these; also batches of arrays and tensors.
            Values of -1 to 1 are images, too, as they once were for diffusers, which warns.
        latent_channels: Channels of latents; None takes no latents.

    Returns:
        PIL images in RGB, all of one size, or a tensor. Shape: [images, channels, height, width].

    Raises:
        ValueError: For what cannot be an image, and images of several sizes.
    """
    if not isinstance(value, list | tuple):
        item = _image(value, latent_channels)
        return [item] if isinstance(item, Image.Image) else item
    if not value:
        raise ValueError("image is an empty list; give one image, or one for each prompt")
    items = [_image(entry, latent_channels) for entry in value]
    images = [entry for entry in items if isinstance(entry, Image.Image)]
    tensors = [entry for entry in items if isinstance(entry, Tensor)]
    if images and tensors:
        raise ValueError("image is a mixture of kinds; give PIL images, paths and 8-bit arrays, or tensors of 0 to 1")
    sizes = {image.size for image in images} or {(entry.shape[-1], entry.shape[-2]) for entry in tensors}
    if len(sizes) > 1:
        listed = ", ".join(f"{width} x {height}" for width, height in sorted(sizes))
        raise ValueError(f"the images have different sizes ({listed}); resize them to one")
    return images or torch.cat(tensors)


def _image(value: Any, latent_channels: int | None) -> Image.Image | Tensor:
    if isinstance(value, str | Path):
        return on_white(open_image(value, "image"))
    if isinstance(value, Image.Image):
        return on_white(bounded(value, "image"))
    if isinstance(value, np.ndarray):
        return _of_array(value)
    if isinstance(value, Tensor):
        return _of_tensor(value, latent_channels)
    raise ValueError(
        f"image is a {type(value).__name__}; expected a PIL image, a path, an array, a tensor, or a list of these"
    )


def _of_array(array: np.ndarray) -> Image.Image | Tensor:
    if array.dtype == np.uint8 and array.ndim in (2, 3) and array.size:
        if array.ndim == 2 or array.shape[2] in (3, 4):
            return on_white(bounded(Image.fromarray(array), "image"))
        if array.shape[2] == 1:
            return on_white(bounded(Image.fromarray(array[..., 0]), "image"))
    if array.dtype.kind != "f" or array.ndim not in (3, 4) or array.shape[-1] != 3:
        raise ValueError(
            f"image is an array of {array.dtype} with the shape {list(array.shape)}; expected 8 bits [height, width, "
            "3], or floats of 0 to 1 [height, width, 3] or [images, height, width, 3]"
        )
    return _of_tensor(torch.from_numpy(np.moveaxis(array, -1, -3).astype(np.float32)))


def _of_tensor(tensor: Tensor, latent_channels: int | None = None) -> Tensor:
    batch = tensor[None] if tensor.dim() == 3 else tensor
    if not tensor.is_floating_point() or batch.dim() != 4 or batch.shape[1] not in (3, latent_channels):
        latents = "" if latent_channels is None else f", or latents [images, {latent_channels}, height, width]"
        raise ValueError(
            f"image is a tensor of {tensor.dtype} with the shape {list(tensor.shape)}; expected floats of 0 to 1 [3, "
            f"height, width] or [images, 3, height, width]{latents}"
        )
    if not 0 < batch.numel() <= 3 * PIXEL_LIMIT:
        raise ValueError(f"image has the shape {list(tensor.shape)}; expected at most {PIXEL_LIMIT} pixels in all")
    if not batch.isfinite().all():
        raise ValueError("image has values that are NaN or infinite")
    low, high = batch.min(), batch.max()
    if batch.shape[1] == 3 and (low < -1 or high > 1):
        raise ValueError(f"image has values from {low:.3g} to {high:.3g}; floats are expected between 0 and 1")
    return batch
