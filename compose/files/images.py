"""Images with a record of how they were made, in PNG metadata.

Images are not trusted: sizes are limited, nothing is executed, and every error names the file and what was found.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Annotated, BinaryIO, Self

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydantic import Field, model_validator

from lora_compose.compose.files.atomic import write_new
from lora_compose.compose.files.paths import free_path, located, moved, to_record
from lora_compose.compose.files.reading import FileError, open_file
from lora_compose.compose.files.text import parse_json
from lora_compose.compose.files.validation import validated
from lora_compose.compose.support.frozen import Frozen
from lora_compose.pipelines.scene.mask_images import FILE_LIMIT, PIXEL_LIMIT, SIDE_LIMIT
from lora_compose.pipelines.scene.scene import Run

RECORD_KEY = "lora-compose"

_MIB = 2**20
_RECORD_LIMIT = 8 * _MIB  # characters; the largest scene file fits, whatever its characters


_Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Hashes = _Sha256 | tuple[_Sha256, ...]
"""Of the file of a concept, or of those that it merges."""


class Machine(Frozen):
    """The machine on which an image was made: the device as torch names it, the processor, and torch's CPU threads."""

    device: str
    name: str
    threads: Annotated[int, Field(gt=0)]


class Record(Frozen):
    """The metadata of an image: how it was made.

    Attributes:
        run: The run, with the method, scheduler and device that were used.
        versions: Of lora-compose, python, torch, diffusers and transformers.
        sha256: SHA-256 of the LoRA files, by concept; of a concept that merges several, one for each in their order.
        images: SHA-256 of the image that it starts from and of its mask, by the name of the field.
        machine: Where it was made.
        method_reason: Why this method was chosen; None if it was asked for, or there are no concepts.
        batch: The seeds of all images that were made in one call with this one, in order; empty if it was made alone.
            The pixels depend on it.
        together: Number of images of a server's batch, which may differ in everything; pixels depend on it by rounding.
    """

    run: Run
    versions: Mapping[str, str]
    sha256: Mapping[str, Hashes]
    machine: Machine
    images: Mapping[str, _Sha256] = {}
    method_reason: str | None = None
    batch: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**63)], ...], Field(max_length=64)] = ()
    together: Annotated[int, Field(ge=1, le=64)] = 1

    @model_validator(mode="after")
    def _in_its_batch(self) -> Self:
        if self.batch and self.run.seed not in self.batch:
            raise ValueError(f"the seed {self.run.seed} is not among those of its batch {list(self.batch)}")
        return self


def save_image(image: Image.Image, path: str | Path, record: Record | None = None) -> Path:
    """Writes a PNG with its record and returns where. It appears whole or not at all, and no file is ever overwritten.

    Missing folders are made; if there is such a file, "-2", "-3", ... is added to its name. Paths in the record are
    made absolute, with "~" for the home folder.
    """
    return write_new(Path(path), png_bytes(image, record), free_path)


def png_bytes(image: Image.Image, record: Record | None = None, *, absolute: bool = True) -> bytes:
    """A PNG with its record, whose paths are made absolute, with "~" for the home folder, unless `absolute` is off."""
    info = PngInfo()
    if record is not None:
        portable = record.model_copy(update={"run": moved(record.run, to_record)}) if absolute else record
        info.add_text(RECORD_KEY, json.dumps(portable.model_dump(mode="json")))
    buffer = BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def read_record(path: str | Path) -> Record:
    """Reads how an image was made; opens no model and no LoRA. FileError if it is no PNG or has no usable record."""
    path = Path(path)
    with open_file(path) as file:
        record = record_in(file, str(path))
    return record.model_copy(update={"run": located(record.run, path)})


def record_in(file: BinaryIO, where: str) -> Record:
    """Reads how an image was made, paths as they are. Raises FileError as `read_record`, with the name `where`."""
    with _opened(file, where) as image:
        text = image.info.get(RECORD_KEY)
    if not isinstance(text, str):
        raise FileError(
            f"{where} has no record of lora-compose: it was made by something else, or a program that edited or "
            "shrank it has dropped the record"
        )
    if len(text) > _RECORD_LIMIT:
        raise FileError(f"{where}: the record has {len(text)} characters; at most {_RECORD_LIMIT} are read")
    where = f"{where}, its record"
    return validated(Record, parse_json(text, where), where)


def read_pixels(path: str | Path) -> Image.Image:
    """The image in a PNG, as RGB. Raises FileError if it is none, is damaged, or too large to be one of ours."""
    with open_file(Path(path)) as file, _opened(file, str(path)) as image:
        return image.convert("RGB")


@contextmanager
def _opened(file: BinaryIO, where: str) -> Iterator[Image.Image]:
    try:
        if file.seek(0, os.SEEK_END) > FILE_LIMIT:
            raise FileError(f"{where} is larger than {FILE_LIMIT} bytes; an image of lora-compose is smaller")
        file.seek(0)
        with Image.open(file, formats=("PNG",)) as image:
            if image.width * image.height > PIXEL_LIMIT or max(image.size) > SIDE_LIMIT:
                raise FileError(
                    f"{where} has {image.width} x {image.height} pixels, too many for an image of lora-compose"
                )
            yield image
    except FileError:
        raise
    except Exception as error:  # images are not trusted, and Pillow raises many kinds of errors for damaged ones
        reason = str(error).strip() or type(error).__name__
        raise FileError(f"{where} is not a readable PNG (another format, truncated or damaged?): {reason}") from error
