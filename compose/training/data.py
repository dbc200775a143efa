"""Images and captions for training. Files are not trusted: everything is checked first."""

import hashlib
import logging
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lora_compose.pipelines.scene.mask_images import IMAGE_SUFFIXES, on_white, upright_image
from lora_compose.pipelines.support.regular import open_regular, sha256_of

logger = logging.getLogger(__name__)

CAPTIONS = "captions.tsv"
_CAPTION_LIMIT = 2**20  # bytes of a file with captions


class DataError(ValueError):
    """Images or captions that cannot be used; the message says which, and what was expected."""


@dataclass(frozen=True)
class ReferenceImage:
    """An image that the model reads beside a caption, and the hash of its file."""

    path: Path
    sha256: str


@dataclass(frozen=True)
class TrainingImage:
    """A training image with its caption, its upright width and height in pixels, and the hash of its file.

    `references` are those that the model reads, in their order.
    """

    path: Path
    caption: str
    size: tuple[int, int]
    sha256: str
    references: tuple[ReferenceImage, ...] = ()


def read_images(folder: Path, prompts: Sequence[str]) -> tuple[TrainingImage, ...]:
    """Reads and checks the images of a folder. DataError if there are none, or images or captions are unreadable.

    Captions are in `captions.tsv` and in .txt files beside images; `prompts` are those of the others, in turn.
    """
    paths = _images_in(folder)
    from_table = _table(folder / CAPTIONS)
    if missing := sorted(from_table.keys() - {path.name for path in paths}):
        logger.warning("%s has captions of images that are not there: %s", CAPTIONS, ", ".join(missing[:5]))
    captions = [from_table.get(path.name) or _beside(path) for path in paths]
    if missing := captions.count(None):
        logger.info("%s: %d of %d images have no caption and get the prompt", folder, missing, len(paths))
    images = []
    for i, (path, caption) in enumerate(zip(paths, captions, strict=True)):
        size = load_image(path).size
        images.append(TrainingImage(path, caption or prompts[i % len(prompts)], size, sha256_of(path)))
    return tuple(images)


def with_references(images: Sequence[TrainingImage], folders: Sequence[Path]) -> tuple[TrainingImage, ...]:
    """Training images with their reference images: from each folder the one of the same name, whatever its ending.

    Raises:
        DataError: If a folder lacks the reference of an image, has two of one name, or one of them is broken.
    """
    for folder in folders:
        by_stem: defaultdict[str, list[Path]] = defaultdict(list)
        for path in _images_in(folder):
            by_stem[path.stem].append(path)
        stems = [image.path.stem for image in images]
        if missing := [stem for stem in stems if stem not in by_stem]:
            raise DataError(
                f"{folder} has no reference image of {', '.join(missing[:5])}; expected one of the same name for each "
                "training image"
            )
        if unused := sorted(by_stem.keys() - set(stems)):
            logger.warning("%s has references of images that are not there: %s", folder, ", ".join(unused[:5]))
        paths = []
        for stem in stems:
            path, *others = by_stem[stem]
            if others:
                raise DataError(f"{folder} has {path.name} and {others[0].name} as references of one image; keep one")
            load_image(path)
            paths.append(path)
        images = [
            replace(image, references=(*image.references, ReferenceImage(path, sha256_of(path))))
            for image, path in zip(images, paths, strict=True)
        ]
    return tuple(images)


def _images_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"there is no folder {str(folder)!r} with images")
    paths = sorted((p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()), key=_natural)
    if not paths:
        raise DataError(f"{folder} holds no images; expected files that end with {', '.join(IMAGE_SUFFIXES)}")
    return paths


def load_image(path: Path) -> Image.Image:
    """Opens an image, upright, as RGB on white. Raises DataError if it is broken or too large."""
    try:
        with open_regular(path) as file:
            return on_white(upright_image(file))
    except Exception as error:  # what a broken image raises depends on its format
        raise DataError(f"{path} is not a readable image (truncated or damaged?): {error}") from error


def square(image: Image.Image, side: int) -> tuple[Image.Image, tuple[int, int]]:
    """The centre square of an RGB image, resized; and how many pixels were cut off at top and left after resizing."""
    scale = side / min(image.size)
    width, height = (max(side, round(length * scale)) for length in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    top, left = (height - side) // 2, (width - side) // 2
    return image.crop((left, top, left + side, top + side)), (top, left)


def pixels_of(image: Image.Image) -> Tensor:
    """The pixels of an RGB image, from -1 to 1. Shape: [1, 3, height, width]."""
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1)
    return pixels.permute(2, 0, 1).contiguous()[None]


def warn_of_small(images: Sequence[TrainingImage], side: int) -> None:
    """Warns of images that have to be enlarged."""
    small = [image.path.name for image in images if min(image.size) < side]
    if small:
        logger.warning(
            "%d of %d images are smaller than %d x %d and are enlarged, so that the concept will be soft: %s",
            len(small), len(images), side, side, ", ".join(small[:5]),
        )  # fmt: skip


def digest(images: Sequence[TrainingImage]) -> str:
    """SHA-256 of all images, captions and references."""
    lines = [
        "\t".join((image.path.name, image.sha256, image.caption, *(reference.sha256 for reference in image.references)))
        for image in images
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    """A key by which 2.png stands before 10.png."""
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", path.name)]


def _table(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    captions: dict[str, str] = {}
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        name, _, rest = line.partition("\t")
        caption = " ".join(rest.split("\t")[0].split())
        if not caption:
            raise DataError(f"{path}, line {number}: expected a file name, a tab and a caption, found {line[:80]!r}")
        if name in captions:
            raise DataError(f"{path}, line {number}: {name} has a caption already")
        captions[name] = caption
    return captions


def _beside(path: Path) -> str | None:
    beside = path.with_suffix(".txt")
    return " ".join(_text(beside).split()) or None if beside.is_file() else None


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_CAPTION_LIMIT + 1)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(data) > _CAPTION_LIMIT:
        raise DataError(f"{path} is larger than {_CAPTION_LIMIT} bytes; those are no captions")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: byte {error.start} is {data[error.start]:#04x}") from error
