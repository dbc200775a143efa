"""Reads mask images (white = inside) given as PIL images, arrays, tensors, paths, boxes, or text (data URIs).

No torch is needed, and numpy only for arrays and tensors: fields of concepts are checked before either is imported.
"""

import base64
import binascii
import os
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps

from lora_compose.pipelines.support.home import expanded
from lora_compose.pipelines.support.numbers import as_plain
from lora_compose.pipelines.support.regular import open_regular

PIXEL_LIMIT = 64 * 2**20
SIDE_LIMIT = 2**15  # pixels; Pillow keeps a pointer to each row, which in narrow images need more than the pixels
FILE_LIMIT = 256 * 2**20  # bytes; some parts of a file are read whole, whatever the size of the image
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
URI_PREFIX = "data:image/png;base64,"

PADDING = 0.25
"""Context around a subject that is repainted, as a share of the longer side of its bounding box."""
BLUR = 0.05
"""Radius of the blend at its border, as a share of that side."""

Box = tuple[int, int, int, int]
"""Edges in pixels, as `attention.masks.Box`, which needs torch."""


def read_mask_image(source: Any, size: tuple[int, int]) -> Image.Image:
    """A mask image (white = inside).

    Args:
        source: A PIL image, a path, an array or a tensor [height, width] (bool, 8 bits, or 0 to 1), or a box (left,
            top, right, bottom) in pixels or in fractions of the image.
        size: Width and height of the image that it belongs to.

    Returns:
        A greyscale image.

    Raises:
        ValueError: For what cannot be a mask, and masks that are black all over.
    """
    source = as_plain(source)
    if isinstance(source, list | tuple) and len(source) == 4 and all(isinstance(side, int | float) for side in source):
        mask = mask_of_box(in_pixels(source, *size), *size)
    elif isinstance(source, list | tuple):
        raise ValueError(
            f"mask_image is a list of {len(source)} where one mask was expected; a box has four numbers: left, "
            "top, right, bottom"
        )
    elif isinstance(source, str | Path):
        mask = greys(open_image(source, "mask"))
    elif isinstance(source, Image.Image):
        mask = greys(bounded(source, "mask_image"))
    else:
        mask = _mask_of_array(source)
    if mask.getextrema()[1] == 0:  # pyright: ignore[reportIndexIssue, reportArgumentType]
        raise ValueError("mask_image is all black; it must be white where the image is painted")
    return mask


def side_of(mask: Image.Image) -> int:
    """The longer side of what is inside of a mask, in pixels."""
    left, top, right, bottom = mask.getbbox() or (0, 0, 1, 1)
    return max(right - left, bottom - top)


def softened(mask: Image.Image, blur: float) -> Image.Image:
    """A mask whose border fades inwards, by `blur` of its longer side, so that nothing outside of it changes."""
    radius = blur * side_of(mask)
    inner = mask.filter(ImageFilter.MinFilter(2 * round(radius) + 1)).filter(ImageFilter.GaussianBlur(radius))
    return ImageChops.darker(mask, inner) if inner.getextrema()[1] >= 128 else mask  # pyright: ignore[reportOperatorIssue]


def each_mask(masks: Any) -> list[Any]:
    """The masks that are given as one: a list of them, or a batch of arrays or tensors; otherwise it is one mask."""
    numbers = isinstance(masks, list | tuple) and all(isinstance(side, int | float) for side in masks)
    if isinstance(masks, list | tuple) and masks and not numbers:
        return [mask for item in masks for mask in each_mask(item)]
    return list(masks) if getattr(masks, "ndim", 0) == 4 else [masks]


def open_image(path: str | Path, what: str) -> Image.Image:
    """Opens an "image" or "mask", upright as `upright_image`. ValueError if it is missing, unreadable or too large."""
    try:
        with open_regular(expanded(path)) as file:
            return upright_image(file)
    except FileNotFoundError as error:
        raise ValueError(f"there is no {what} {str(path)!r}; expected a {', '.join(FORMATS)} file") from error
    except Exception as error:  # images are not trusted, and Pillow raises many kinds of errors for damaged ones
        reason = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
        raise ValueError(f"the {what} {str(path)!r} cannot be read: {reason}") from error


def upright_image(file: BinaryIO, formats: Sequence[str] = FORMATS) -> Image.Image:
    """Decodes an image, and turns it as its EXIF orientation says; every image that a user gives is opened here.

    Args:
        file: The image. Images are not trusted: sizes are judged by the header, before anything is decoded.
        formats: Pillow's names of those that are expected.

    Raises:
        ValueError: If it is too large.
        Exception: Pillow raises many kinds for what is damaged or no image.
    """
    if (size := file.seek(0, os.SEEK_END)) > FILE_LIMIT:
        raise ValueError(f"it has {size} bytes; expected at most {FILE_LIMIT}")
    file.seek(0)
    with Image.open(file, formats=list(formats)) as image:
        return ImageOps.exif_transpose(bounded(image, "it"))


def on_white(image: Image.Image) -> Image.Image:
    """An image in RGB, on white where it is transparent; the colours that transparency hides are of no account."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def greys(image: Image.Image) -> Image.Image:
    """A mask image in greyscale: its opacity if a pixel is transparent, otherwise its brightness."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        opacity = image.convert("RGBA").getchannel("A")
        if opacity.getextrema()[0] < 255:  # pyright: ignore[reportOperatorIssue]
            return opacity
    return image.convert("L")


def mask_name(path: str) -> str:
    """The name of a mask in messages: its path, if it has one."""
    return "image that was given" if path.startswith(URI_PREFIX) else repr(path)


def region_of(region: Any) -> Any:
    """Converts a region for a `Concept`: paths and images become text, everything else is unchanged.

    Raises:
        ValueError: For numbers that are neither whole pixels nor fractions of the image.
    """
    if isinstance(region, Path):
        return str(region)
    region = as_plain(region)
    if isinstance(region, Image.Image) or hasattr(region, "__array__"):
        return as_uri(read_mask_image(region, (1, 1)))
    numbers = isinstance(region, list | tuple) and all(isinstance(side, float | int) for side in region)
    if numbers and not is_fractions(region):
        _check_whole(region)
    return region


def in_pixels(box: Sequence[float], width: int, height: int) -> Box:
    """A box in whole pixels.

    Args:
        box: Left, top, right, bottom: pixels, or, where all are at most 1 and one of them is a float, fractions of
            width and height.

    Raises:
        ValueError: For boxes that are empty or leave the image.
    """
    left, top, right, bottom = box
    if is_fractions(box):
        left, top, right, bottom = left * width, top * height, right * width, bottom * height
        left, top = min(round(left), width - 1), min(round(top), height - 1)
        box = (left, top, max(left + 1, round(right)), max(top + 1, round(bottom)))
    _check_whole(box)
    left, top, right, bottom = (int(side) for side in box)
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise ValueError(
            f"the box {left, top, right, bottom} does not lie in the image of {width} x {height} pixels; expected "
            "left, top, right, bottom with left < right and top < bottom"
        )
    return left, top, right, bottom


def _check_whole(box: Sequence[float]) -> None:
    if any(side % 1 != 0 for side in box):  # also infinite ones, and those that are no number
        raise ValueError(f"a box is in whole pixels, or in fractions of 0 to 1 such as (0.0, 0.2, 0.5, 1.0), not {box}")


def is_fractions(box: Sequence[float]) -> bool:
    """Whether a box is in fractions of the image: all numbers are at most 1, and one of them is a float."""
    return any(isinstance(side, float) for side in box) and all(0 <= side <= 1 for side in box)


def mask_of_box(box: Box, width: int, height: int) -> Image.Image:
    """A mask image that is white in a box."""
    mask = Image.new("L", (width, height))
    left, top, right, bottom = box
    ImageDraw.Draw(mask).rectangle((left, top, right - 1, bottom - 1), fill=255)
    return mask


def as_uri(mask: Image.Image) -> str:
    """A mask image as a data URI, which is accepted wherever a path is."""
    buffer = BytesIO()
    mask.save(buffer, "PNG")
    return URI_PREFIX + base64.b64encode(buffer.getvalue()).decode()


def from_uri(text: str) -> Image.Image:
    """The image in a data URI; raises ValueError if it is damaged or too large."""
    try:
        data = base64.b64decode(text.removeprefix(URI_PREFIX), validate=True)
        return upright_image(BytesIO(data), ("PNG",))
    except binascii.Error as error:
        raise ValueError(f"a mask given as text ({URI_PREFIX}...) is damaged: {error}") from error
    except Exception as error:  # as for files
        raise ValueError(f"a mask given as text cannot be read: {str(error) or type(error).__name__}") from error


def bounded(image: Image.Image, what: str) -> Image.Image:
    """Checks an image's size, and that its mode has a fixed range; raises ValueError if not."""
    if max(image.size) > SIDE_LIMIT:
        raise ValueError(f"{what} has {image.width} x {image.height} pixels; expected at most {SIDE_LIMIT} a side")
    if not 0 < image.width * image.height <= PIXEL_LIMIT:
        raise ValueError(f"{what} has {image.width} x {image.height} pixels; expected at most {PIXEL_LIMIT} in all")
    if image.mode[0] in "IF":
        raise ValueError(
            f"{what} has the mode {image.mode!r}, whose values have no fixed range; convert it to 8 bits (RGB or L)"
        )
    return image


def _mask_of_array(array: Any) -> Image.Image:
    if not hasattr(array, "__array__"):
        raise ValueError(
            f"mask_image is a {type(array).__name__}; expected a PIL image, a path, an array, a tensor or a box"
        )
    import numpy as np

    if hasattr(array, "detach"):  # a tensor
        array = array.detach().cpu()
        array = array.float() if array.is_floating_point() else array
    values = np.asarray(array)
    values = values.reshape([side for side in values.shape if side != 1] or [1, 1]) if values.ndim > 2 else values
    if values.ndim != 2 or not 0 < values.size <= PIXEL_LIMIT:
        raise ValueError(f"mask_image has the shape {list(array.shape)}; expected [height, width]")
    if values.dtype == np.bool_:
        values = values * np.float32(1)
    elif values.dtype == np.uint8:
        return Image.fromarray(values)
    elif values.dtype.kind != "f":
        raise ValueError(f"mask_image is of {values.dtype}; expected bool, 8 bits, or floats of 0 to 1")
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
        raise ValueError("mask_image has values that are NaN or outside 0 to 1")
    # Pixels are painted from one half on, so rounding must not move a value across it.
    levels = np.where(values < 0.5, np.minimum(np.round(values * 255), 127), np.maximum(np.round(values * 255), 128))
    return Image.fromarray(levels.astype(np.uint8))
