"""The files of one session: in a folder of its own, under our own names, all of them read and checked first."""

import base64
import binascii
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, UnidentifiedImageError

from lora_compose.compose.figures.overlay import colour
from lora_compose.compose.files.images import Hashes, Record, png_bytes, read_pixels, record_in
from lora_compose.compose.files.paths import is_hub_name
from lora_compose.compose.files.reading import FileError
from lora_compose.compose.generate.facts import file_hash
from lora_compose.compose.playground.assets import (
    PLAYGROUND,
    PLAYGROUNDS,
    playground_lora,
    playground_loras,
    playground_of,
    playground_references,
)
from lora_compose.compose.support.folders import of_this_process
from lora_compose.pipelines.concepts.finding import find_file
from lora_compose.pipelines.concepts.loading import LoraError, LoraFile, read_lora
from lora_compose.pipelines.formats.recognise import guess_family
from lora_compose.pipelines.formats.triggers import Candidate, Words
from lora_compose.pipelines.scene.mask_images import FORMATS, from_uri, greys, on_white, upright_image
from lora_compose.pipelines.scene.scene import Concept
from lora_compose.pipelines.support.home import expanded

UPLOAD_LIMIT = 2**30
"""Bytes of an uploaded LoRA."""

PNG_LIMIT = 64 * 2**20
"""Bytes of an image that is dropped in."""

MASK_LIMIT = 4 * 2**20
"""Characters of a painted mask."""

MOST_FILES = 60
"""Images of a folder that are shown."""

SUFFIX = ".safetensors"
_CHUNK = 2**20
_THUMBNAIL_LIMIT = 2**20  # characters of an image in a file's metadata
_SIDE = 96


@dataclass(frozen=True)
class ShownLora:
    """A LoRA that can be chosen.

    Attributes:
        shown: Its name on the page.
        thumbnail: A PNG; None if there is no image of it.
        family: The family of models that it is for, as far as its keys and metadata tell.
        composed: Whether models of that family can be composed here.
        triggers: Words of its captions and folders that may be the trigger.
        class_words: The same for the class word.
    """

    source: str
    shown: str
    sha256: str = ""
    trigger: str = ""
    class_word: str = ""
    trained_with: str = ""
    thumbnail: bytes | None = None
    family: str | None = None
    composed: bool = True
    triggers: tuple[Candidate, ...] = ()
    class_words: tuple[Candidate, ...] = ()

    def concept(self, name: str) -> Concept:
        """A concept with this LoRA."""
        return Concept(name=name, lora=self.source, trigger=self.trigger, class_word=self.class_word, weight=1.0)


@dataclass(frozen=True)
class StartImage:
    """An image to start from.

    Attributes:
        path: Path of its copy, a PNG in a size that the model supports.
        shown: The user's name for it.
        mask: Path of the mask that was painted over it; None repaints everywhere.
    """

    path: str
    shown: str
    size: tuple[int, int]
    mask: str | None = None


class Store:
    """The files of a session, in a folder of its own.

    Attributes:
        uploads: The LoRAs among them.
        images: Names of start images and their masks, by path.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=of_this_process("page")))
        self.uploads: list[ShownLora] = []
        self.images: dict[str, str] = {}

    @property
    def names(self) -> dict[str, str]:
        """The user's names of uploads, by their paths and by their names on the disk."""
        return {name: lora.shown for lora in self.uploads for name in (lora.source, Path(lora.source).name)}

    def close(self) -> bool:
        """Deletes all of them; True once the folder is gone, which takes longer while one is just being written."""
        self.uploads = []
        shutil.rmtree(self.folder, ignore_errors=True)
        return not self.folder.exists()

    def add_upload(self, name: str, data: BinaryIO) -> ShownLora:
        """Keeps an uploaded LoRA. Nothing is kept of a file that cannot be used.

        Args:
            name: The user's name for it; never a part of a path.

        Raises:
            FileError: If it is too large or no safetensors file by its name.
            LoraError: If it cannot be used; the message says why.
        """
        shown = _shown(name)
        if not shown.lower().endswith(SUFFIX):
            raise FileError(f"{shown}: only {SUFFIX} files are accepted; other formats could run code when opened")
        path = self.new_path()
        try:
            _copy(data, path, UPLOAD_LIMIT, shown)
            return self.keep(path, shown)
        except BaseException as error:
            path.unlink(missing_ok=True)
            if isinstance(error, LoraError | FileError):
                raise type(error)(str(error).replace(path.name, shown)) from error
            raise

    def new_path(self) -> Path:
        """A free path for a LoRA."""
        return self.folder / f"{secrets.token_hex(12)}{SUFFIX}"

    def keep(self, path: Path, shown: str, **words: str) -> ShownLora:
        """Takes a file of this folder among the uploads, unless there is the same already.

        Args:
            words: Trigger and class word, for a file that does not contain them.

        Raises:
            LoraError: If it cannot be used.
        """
        lora = replace(_described(read_lora(path), str(path), shown), **words)
        known = next((upload for upload in self.uploads if upload.sha256 == lora.sha256), None)
        if known is not None:
            path.unlink()
            return known
        self.uploads.append(lora)
        return lora

    def add_image(
        self,
        name: str,
        data: BinaryIO,
        side: int,
        cell: int = 8,
        fitting: Callable[[int, int], tuple[int, int]] | None = None,
    ) -> StartImage:
        """Keeps a copy of an image to start from; FileError if it is too large or no image.

        The user's name is never a part of a path. Its longer side has at most `side` pixels, and both are multiples of
        `cell`; `fitting` goes from its width and height to those of the copy.
        """
        shown = _shown(name)
        if data.seek(0, os.SEEK_END) > PNG_LIMIT:
            raise FileError(f"{shown} is larger than {PNG_LIMIT // 2**20} MB, which is the maximum")
        data.seek(0)
        try:
            image = on_white(upright_image(data))
        except Exception as error:  # images are not trusted, and Pillow raises many kinds of errors for damaged ones
            raise FileError(f"{shown} cannot be read as an image; expected {', '.join(FORMATS)}") from error
        share = min(1.0, side / max(image.size))
        width, height = (max(cell, int(length * share) // cell * cell) for length in image.size)
        if fitting is not None:
            width, height = fitting(width, height)
        path = self.folder / f"{secrets.token_hex(12)}.png"
        image.resize((width, height), Image.Resampling.LANCZOS).save(path)
        self.images[str(path)] = f"{Path(shown).stem}.png"
        return StartImage(str(path), shown, (width, height))

    def add_mask(self, start: StartImage, uri: str) -> StartImage:
        """The image with a mask painted in the browser, opaque where it is painted. ValueError for anything else."""
        if len(uri) > MASK_LIMIT:
            raise ValueError("The mask is too large.")
        mask = greys(from_uri(uri)).resize(start.size).point([255 if grey > 127 else 0 for grey in range(256)])
        if mask.getbbox() is None:
            return replace(start, mask=None)
        path = self.folder / f"{secrets.token_hex(12)}.png"
        mask.save(path)
        self.images[str(path)] = "mask.png"
        return replace(start, mask=str(path))


def dropped(name: str, data: BinaryIO) -> Record:
    """The record in an image that was dropped in, which is not kept. Raises FileError if it is no image of ours."""
    if data.seek(0, os.SEEK_END) > PNG_LIMIT:
        raise FileError(f"{_shown(name)} is larger than {PNG_LIMIT // 2**20} MB, which is the maximum")
    return record_in(data, _shown(name))


def playground(model: str = PLAYGROUND) -> list[ShownLora]:
    """The LoRAs of a playground."""
    return [named(f"{model}:{name}") for name in playground_loras(model)]


def in_folder(folder: Path) -> list[Path]:
    """The safetensors files of a folder, by name; raises FileError if there is no such folder, or it cannot be read."""
    try:
        paths = sorted(path for path in expanded(folder).iterdir() if path.suffix.lower() == SUFFIX)
    except (OSError, RuntimeError) as error:
        raise FileError(f"the folder {str(folder)!r} cannot be read: {error}") from error
    return [path for path in paths if path.is_file()]


def named(source: str) -> ShownLora:
    """The LoRA of a `Concept.lora`: of the playground, a file, or a repository, which is downloaded.

    Raises LoraError if it cannot be used, ValueError if the playground has none of that name, and OSError if it cannot
    be read.
    """
    model, colon, name = source.partition(":")
    if colon and model in PLAYGROUNDS:
        return _described(read_lora(playground_lora(name, model)), source, name, _reference(name))
    path = find_file(source)
    if is_on_hub(source):
        return _described(read_lora(path), source, source)
    return _described(read_lora(path), str(path), path.name, beside(path))


def beside(path: Path) -> Path | None:
    """The image beside a file, where many programs put it."""
    return next(filter(Path.is_file, (path.with_suffix(suffix) for suffix in (".png", ".preview.png"))), None)


def is_on_hub(source: str) -> bool:
    """Whether a source would be downloaded: a repository, and nothing of that name on this machine."""
    return is_hub_name(source) and not expanded(source).exists()


def located(
    record: Record, uploads: Sequence[ShownLora], folder: Path | None, *, local: bool
) -> dict[str, ShownLora | None]:
    """The LoRAs of a record, by concept: those with the recorded content, wherever they are; None for others.

    Images are not trusted: a path in one is followed only if the page is local (open to this machine only), and its
    file is used only if the content is the recorded one. A repository counts as missing until the user asks for its
    download.
    """
    known = {lora.sha256: lora for lora in uploads}
    return {
        concept.name: _located(concept.lora, record.sha256.get(concept.name, ""), known, folder, local)
        for concept in record.run.scene.concepts
    }


def _located(
    source: Any, sha256: Hashes, known: dict[str, ShownLora], folder: Path | None, local: bool
) -> ShownLora | None:
    if not isinstance(source, str) or not isinstance(sha256, str):
        return None  # several files that were merged when they were loaded, or none at all
    if sha256 in known:
        return known[sha256]
    if source in {f"{model}:{name}" for model in PLAYGROUNDS for name in playground_loras(model)}:
        return named(source)
    nearby = in_folder(folder) if folder is not None and folder.is_dir() else []
    for path in [*([expanded(source)] if local and source else []), *nearby]:
        if path.suffix.lower() == SUFFIX and path.is_file() and file_hash(str(path)) == sha256:
            return named(str(path))
    return None


def located_references(record: Record, uploads: Mapping[str, str], *, local: bool) -> tuple[str, ...]:
    """The reference images of a record that are here with the recorded content, as `located` finds LoRAs.

    Args:
        uploads: Images of the session, by path.
    """
    here = []
    for number, path in enumerate(record.run.scene.references):
        file = expanded(path)
        readable = (local or path in uploads) and file.is_file()
        here += [path] if readable and file_hash(path) == record.images.get(f"references.{number}") else []
    return tuple(here)


def image_files(folder: Path) -> list[Path]:
    """The newest images of a folder and the folders in it."""
    paths = [*folder.glob("*.png"), *folder.glob("*/*.png")] if folder.is_dir() else []
    return sorted(filter(Path.is_file, paths), key=lambda path: path.stat().st_mtime, reverse=True)[:MOST_FILES]


def _copy(data: BinaryIO, path: Path, limit: int, shown: str) -> None:
    """Copies in pieces, so that a file above the limit is noticed early."""
    size = 0
    with path.open("wb") as file:
        while piece := data.read(_CHUNK):
            size += len(piece)
            if size > limit:
                raise FileError(f"{shown} is larger than {limit // 2**20} MB, which is the maximum")
            file.write(piece)


def _shown(name: str) -> str:
    """The last part of a name, however a path is written; it is shown, never opened."""
    return name.replace("\\", "/").rpartition("/")[2][:120] or "a file without a name"


def _described(file: LoraFile, source: str, shown: str, image: Path | None = None) -> ShownLora:
    shapes = {key: tensor.shape for key, tensor in file.tensors.items()}
    return replace(
        described(source, shown, file.words, shapes, file.metadata, image),
        sha256=file.sha256,
        trained_with=(file.metadata.get("method") or "").strip(),
        triggers=file.words.triggers,
        class_words=file.words.class_words,
    )


def described(
    source: str,
    shown: str,
    words: Words,
    shapes: Mapping[str, Sequence[int]],
    metadata: Mapping[str, str],
    image: Path | None,
) -> ShownLora:
    """A LoRA as the header of its file describes it, with an image of it or the one in its metadata."""
    ours, guess = playground_of(metadata.get("base_model")), guess_family(shapes, metadata)
    return ShownLora(
        source=source,
        shown=shown,
        trigger=(words.trigger or "").strip(),
        class_word=(words.class_word or "").strip(),
        thumbnail=_thumbnail(image) if image else _embedded(metadata.get("modelspec.thumbnail")),
        family=ours or guess.family,
        composed=ours is not None or guess.supported,
    )


def _reference(name: str) -> Path | None:
    try:
        return playground_references(name.removesuffix("-tara"))[0]
    except ValueError:  # no images of this one
        return None


def _thumbnail(path: Path) -> bytes | None:
    try:
        return _small(read_pixels(path))
    except FileError:
        return None


def _embedded(uri: str | None) -> bytes | None:
    """The image that trainers write into the metadata as a data URI."""
    head, comma, text = (uri or "").partition(",")
    if not comma or not head.startswith("data:image/") or len(text) > _THUMBNAIL_LIMIT:
        return None
    try:
        return _small(on_white(upright_image(BytesIO(base64.b64decode(text)), ("PNG", "JPEG", "WEBP"))))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, binascii.Error, Image.DecompressionBombError):
        return None


def _small(image: Image.Image) -> bytes:
    image.thumbnail((_SIDE, _SIDE))
    return png_bytes(image)


def tile(index: int) -> bytes:
    """A plain tile in a concept's colour, where there is no image."""
    return png_bytes(Image.new("RGB", (_SIDE, _SIDE), colour(index)))
