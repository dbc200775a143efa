"""Where a concept may appear, as a mask: from a box, or from a picture that is white inside."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from attention.layers import Grid
from attention.masks import Box, box_mask, resize_mask

_PIXEL_LIMIT = 64 * 2**20
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")


def read_mask(path: str) -> Tensor:
    """Reads a mask: brightness, or opacity where the picture has any, white or opaque is inside.

    Returns:
        Values in 0..1. Shape: [height, width], fp32.

    Raises:
        ValueError: If it is missing or unreadable, or nothing is inside.
    """
    try:
        with Image.open(Path(path).expanduser(), formats=_FORMATS) as image:
            if image.width * image.height > _PIXEL_LIMIT:
                raise ValueError(f"the mask {path!r} has {image.width} x {image.height} pixels, which is too large")
            has_opacity = image.mode in ("RGBA", "LA", "PA")
            values = image.convert("RGBA").getchannel("A") if has_opacity else image.convert("L")
    except FileNotFoundError as error:
        raise ValueError(
            f"there is no mask {path!r}; expected a picture that is white where the concept may be"
        ) from error
    except (OSError, UnidentifiedImageError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"the mask {path!r} cannot be read: {error}") from error
    mask = torch.from_numpy(np.asarray(values, dtype=np.float32) / 255)
    if not mask.any():
        raise ValueError(f"the mask {path!r} is black all over; it has to be white where the concept may be")
    return mask


def check_mask(path: str, width: int | None, height: int | None) -> None:
    """Raises ValueError if a mask cannot be used, or has other proportions than the canvas."""
    mask_height, mask_width = read_mask(path).shape
    if width is not None and height is not None and abs(mask_width * height / mask_height - width) > 1 + width / 100:
        raise ValueError(
            f"the mask {path!r} has {mask_width} x {mask_height} pixels, the canvas {width} x {height}: "
            "their proportions differ"
        )


def region_mask(region: Box | str | None, image_size: Grid, grid: Grid) -> Tensor:
    """A region on a grid; 1 everywhere without a region.

    Args:
        region: A box in pixels, or the path of a mask.
        image_size: Height and width of the canvas in pixels.
        grid: The grid wanted.

    Returns:
        Values in 0..1, of which one is 1. Shape: [grid height, grid width], fp32.
    """
    if region is None:
        return torch.ones(grid)
    return resize_mask(read_mask(region), grid) if isinstance(region, str) else box_mask(region, image_size, grid)
