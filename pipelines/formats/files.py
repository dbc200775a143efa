"""A LoRA file on disk -> checked tensors with their metadata. Files are not trusted."""

import hashlib
import json
import math
import os
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_compose.pipelines.formats import kinds
from lora_compose.pipelines.formats.keys import Part, bundled_embedding, parse
from lora_compose.pipelines.formats.safetensors_reader import (
    MAX_BYTES,
    MAX_HEADER,
    MAX_TENSORS,
    DamagedError,
    read_header,
    read_tensors,
)
from lora_compose.pipelines.formats.triggers import Words, words_of
from lora_compose.pipelines.support.finite import all_finite
from lora_compose.pipelines.support.regular import open_regular

PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_WHOLE = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)  # some trainers store alphas as integers
_MAX_KEY = 256  # characters; bounded for the same reason as `MAX_TENSORS`
MAX_WORDS = 100
"""The most words (textual inversions) that a file may bundle; usual are one to ten. Prompts are searched for each."""
MAX_VECTORS = 75
"""The most vectors of a bundled word: so many tokens a text encoder reads at once."""
_BY_LAYER = "new_concept_embedding."  # a word's vectors are those of the layers that read it
# Configurations that PEFT writes beside its file, not into it.
PEFT_FILE, PEFT_CONFIG = "adapter_model", "adapter_config.json"


class LoraError(ValueError):
    """A file or adapter that cannot be used as a concept; the message says why and what was expected."""


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file as read, not yet matched with a model.

    Attributes:
        sha256: Digest of its content.
        metadata: The strings in its header.
        tensors: Its weights by key.
        config: PEFT's settings (alpha, patterns of alphas, ...) by part of the pipeline, or under "" for every part;
            from the header or from `adapter_config.json` beside the file.
        embeddings: Bundled words (textual inversions), with their vectors by text encoder. A word may have several
            tokens; an ED-LoRA (Mix-of-Show, arXiv 2305.18292) has a vector for each of the 16 cross-attention layers of
            SD 1.x, in forward order. Shape: [tokens, layers, width].
    """

    path: Path
    sha256: str
    metadata: Mapping[str, str]
    tensors: Mapping[str, Tensor] = field(repr=False)
    config: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    embeddings: Mapping[str, Mapping[Part, Tensor]] = field(default_factory=dict, repr=False)

    @cached_property
    def words(self) -> Words:
        """Trigger and class word as the file's metadata states them, with candidates."""
        return words_of(self.metadata, self.embeddings)

    @property
    def trigger(self) -> str | None:
        """The trigger, if the file names it."""
        return self.words.trigger

    @property
    def class_word(self) -> str | None:
        """The noun after the trigger, if the file names it."""
        return self.words.class_word

    @property
    def reads_references(self) -> bool | None:
        """True if the file says that it was trained with reference images (`lora-compose train`); otherwise None."""
        return True if self.metadata.get("references") else None


def read_words(path: Path) -> Words:
    """What a safetensors header tells about its words; no tensor is read. Raises LoraError if it is unreadable."""
    with _opened(path) as file:
        header = read_header(file)
    words = check_words(path, {key: entry.shape for key, entry in header.entries.items()})
    return words_of(header.metadata, words)


def trained_with(path: Path) -> str | None:
    """How a LoRA was trained ("tara"), from its header. Raises LoraError if that is unreadable."""
    with _opened(path) as file:
        return read_header(file).metadata.get("method")


def read_lora(path: Path, *, allow_pickle: bool = False) -> LoraFile:
    """Reads and checks a file. It is opened once, so the digest is of the same bytes as the tensors.

    Args:
        path: A safetensors file, or with `allow_pickle` one that `torch.save` has written.
        allow_pickle: Also opens pickles, with `weights_only=True`: tensors are read, no code is run.

    Raises:
        LoraError: If it cannot be opened, is a pickle and those are not allowed, is truncated or corrupt, holds no
            LoRA, or has weights that are not finite or not floating point.
    """
    pickled = path.suffix.lower() in PICKLES
    if not (pickled and allow_pickle):
        refuse_format(path)
    digest = hashlib.sha256()
    with _opened(path) as file:
        if pickled:
            content = _content(path, file)
            digest.update(content)
            metadata, entries = {}, _unpickled(path, content)
        else:
            header = read_header(file)
            metadata = dict(header.metadata)
            shapes = {key: entry.shape for key, entry in header.entries.items()}
            entries = read_tensors(file, header, wanted_keys(path, shapes), digest)
    return lora_file(path, digest.hexdigest(), metadata, entries)


def lora_file(path: Path, sha256: str, metadata: Mapping[str, str], entries: Mapping[str, Tensor]) -> LoraFile:
    """Checks the tensors of a file and makes a `LoraFile` of them."""
    _check_keys(path, entries)
    tensors = {key: tensor for key, tensor in entries.items() if bundled_embedding(key) is None}
    config = {**_header_config(path, metadata), **_neighbour_config(path)}
    return LoraFile(path, sha256, metadata, tensors, config, _embeddings(entries))


def refuse_format(path: Path) -> None:
    """Raises LoraError for files with the extension of a pickle, and of GGUF."""
    if path.suffix.lower() == ".gguf":
        raise LoraError(
            f"{path.name} is GGUF, the format of quantised models; expected a LoRA as safetensors, which also "
            "works with a model in GGUF"
        )
    if path.suffix.lower() in PICKLES:
        raise LoraError(
            f"{path.name} is a pickle, which could run code when opened; convert it to safetensors first, or load it "
            "with allow_pickle=True, which reads tensors only"
        )


@contextmanager
def _opened(path: Path) -> Iterator[BufferedReader]:
    """Opens a file; errors while it is read become LoraErrors."""
    try:
        with open_regular(path) as file:
            try:
                yield file
            except DamagedError as error:
                file.seek(0)
                looks = _other_format(file.read(2))
                raise LoraError(f"{path.name} is not a readable safetensors file ({looks}): {error}") from error
            except LoraError:
                raise
            except ValueError as error:
                raise LoraError(f"{path.name}: {error}") from error
    except OSError as error:
        raise LoraError(f"{path.name} cannot be read: {error.strerror or error}") from error


def wanted_keys(path: Path, shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """The keys to read, of a whole model those of its LoRA. LoraError for none, or more than a LoRA has."""
    keys = list(shapes)
    longest = max(map(len, keys), default=0)
    if len(keys) > MAX_TENSORS or longest > _MAX_KEY:
        raise LoraError(
            f"{path.name} has {len(keys)} keys of up to {longest} characters; a LoRA has at most {MAX_TENSORS} keys of "
            f"{_MAX_KEY} characters"
        )
    inside = [key for key in keys if ".lora_layer." in key]
    if inside:
        return inside
    numbered = [key for key in keys if key.startswith(("unet:", "text_encoder:"))]
    if numbered:
        raise LoraError(
            f"{path.name} numbers its layers instead of naming them ({numbered[0]!r}, as early lora_diffusion did), in "
            "an order that depends on the version of diffusers it was trained with; convert it with that version"
        )
    if not any(parse(key) is not None for key in keys):
        shown = ", ".join(keys[:3]) or "none"
        raise LoraError(
            f"{path.name} is not a LoRA: expected keys with lora_A/lora_B, lora_down/lora_up, hada or lokr, "
            f"found {shown}"
        )
    check_words(path, shapes)
    return keys


def check_words(path: Path, shapes: Mapping[str, Sequence[int]]) -> Sequence[str]:
    """The words that a file bundles, checked by their vectors' shapes. LoraError if these are none, or too many."""
    words: dict[str, None] = {}
    for key, shape in shapes.items():
        if (known := bundled_embedding(key)) is None:
            continue
        words[known[0]] = None
        if len(shape) not in (1, 2) or 0 in shape:
            raise LoraError(f"{path.name}: the embedding {key} has shape {list(shape)}; expected vectors")
        by_layer = key.startswith(_BY_LAYER)  # compared with the model's layers when it is matched
        if len(shape) == 2 and shape[0] > MAX_VECTORS and not by_layer:
            raise LoraError(
                f"{path.name}: the word {known[0]!r} has {shape[0]} vectors; expected at most {MAX_VECTORS}, as many "
                "tokens as a text encoder reads at once"
            )
    if len(words) > MAX_WORDS:
        raise LoraError(f"{path.name} bundles {len(words)} words (textual inversions); expected at most {MAX_WORDS}")
    return list(words)


def _content(path: Path, file: BufferedReader) -> bytes:
    """A whole file, if it is not too large; it may claim more than is stored."""
    if (size := os.fstat(file.fileno()).st_size) > MAX_BYTES:
        raise LoraError(f"{path.name} has {size / 2**30:.1f} GiB; a LoRA has at most {MAX_BYTES >> 30} GiB")
    return file.read()


def _unpickled(path: Path, content: bytes) -> dict[str, Tensor]:
    """Tensors by key, dictionaries inside dictionaries written with dots (ED-LoRA: `params.unet...`)."""
    _check_archive(path, content)
    try:
        with warnings.catch_warnings(action="ignore"):  # about how the file was pickled
            loaded = torch.load(BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        first = str(error).splitlines()[0] if str(error) else "damaged"
        raise LoraError(f"{path.name} holds more than tensors, or is damaged; it was not opened: {first}") from error
    except Exception as error:  # torch raises nearly anything for damaged archives
        raise LoraError(f"{path.name} is not a readable torch.save file: {type(error).__name__}: {error}") from error
    entries = dict(_flat(path, loaded))
    for outer in ("params.", "params_ema.", "state_dict."):
        if any(key.startswith(outer) for key in entries):
            entries = {key.removeprefix(outer): t for key, t in entries.items() if key.startswith(outer)}
            break
    shapes = {key: tensor.shape for key, tensor in entries.items()}
    return {key: entries[key] for key in wanted_keys(path, shapes)}


def _check_archive(path: Path, content: bytes) -> None:
    """Refuses archives that unpack to more than their size: torch.save does not compress."""
    if zipfile.is_zipfile(BytesIO(content)):
        try:
            with zipfile.ZipFile(BytesIO(content)) as archive:
                unpacked = sum(entry.file_size for entry in archive.infolist())
        except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise LoraError(f"{path.name} is a damaged archive: {error}") from error
        if unpacked > len(content):
            raise LoraError(f"{path.name} unpacks to {unpacked} bytes, more than its size; it was not opened")


def _flat(path: Path, content: Any, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    if not isinstance(content, Mapping) or depth > 4:
        raise LoraError(f"{path.name} holds a {type(content).__name__} at {prefix or 'its root'!r}; expected tensors")
    for key, value in content.items():
        if isinstance(value, Tensor):
            # Views can claim more than is stored.
            if (
                value.layout is not torch.strided
                or value.numel() * value.element_size() > value.untyped_storage().nbytes()
            ):
                raise LoraError(f"{path.name}: {prefix}{key} is not a plain tensor")
            yield f"{prefix}{key}", value.detach().contiguous()
        elif isinstance(value, Mapping):
            yield from _flat(path, value, f"{prefix}{key}.", depth + 1)


def _check_keys(path: Path, entries: Mapping[str, Tensor]) -> None:
    for key, tensor in entries.items():
        parsed = parse(key)
        number = parsed.slot if parsed is not None and parsed.kind is None else ""
        flag = number in kinds.flags()  # OneTrainer stored them as whole numbers while it had another formula
        if flag and tensor.dtype is not torch.bool:
            raise LoraError(f"{path.name}: {key} is stored as {tensor.dtype}; expected torch.bool, as OneTrainer does")
        if tensor.dtype not in (*_DTYPES, *(_WHOLE if number else ()), *((torch.bool,) if flag else ())):
            raise LoraError(f"{path.name}: {key} is stored as {tensor.dtype}; expected float32, float16 or bfloat16")
        if number and tensor.numel() != 1:
            raise LoraError(f"{path.name}: {key} has shape {list(tensor.shape)}; expected one number")
        # ai-toolkit's alpha of a LoKr of whole matrices, which has no effect, is more than fp16 can hold
        if not all_finite(tensor) and not (key.endswith(".alpha") and tensor.item() == math.inf):
            raise LoraError(f"{path.name}: {key} has values that are NaN or infinite; the file is damaged")


def _other_format(start: bytes) -> str:
    pickled = start[:1] == b"\x80" or start == b"PK"  # a guess: valid safetensors files may begin with these bytes too
    return "a pickle or an archive under another name" if pickled else "truncated or corrupt"


def _header_config(path: Path, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """PEFT's configuration as diffusers writes it into the header.

    Keys start with the component's name, but where a model has saved its adapter itself (`save_lora_adapter`).
    """
    settings = _json(path, "lora_adapter_metadata", metadata.get("lora_adapter_metadata", "{}"))
    config: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        part, _, name = key.rpartition(".")
        config.setdefault(part, {})[name] = value
    return config


def _neighbour_config(path: Path) -> dict[str, dict[str, Any]]:
    """PEFT's configuration as PEFT itself writes it, into a file of its own."""
    if path.stem != PEFT_FILE:
        return {}
    try:
        with open_regular(path.with_name(PEFT_CONFIG)) as file:
            text = file.read(MAX_HEADER + 1)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise LoraError(f"{PEFT_CONFIG} beside {path.name} cannot be read: {error.strerror or error}") from error
    if len(text) > MAX_HEADER:
        raise LoraError(f"{PEFT_CONFIG} beside {path.name} is too large to be settings")
    return {"": _json(path, PEFT_CONFIG, text)}


def _json(path: Path, what: str, text: str | bytes) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LoraError(f"{path.name}: {what} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise LoraError(f"{path.name}: {what} is {str(config)[:80]!r}; expected settings by name")
    return config


def _embeddings(entries: Mapping[str, Tensor]) -> dict[str, dict[Part, Tensor]]:
    """Bundled words and their vectors: those of an ED-LoRA, and textual inversions."""
    words: dict[str, dict[Part, Tensor]] = {}
    for key, tensor in entries.items():
        if (known := bundled_embedding(key)) is not None:
            vectors = tensor[None] if tensor.ndim == 1 else tensor
            by_layer = key.startswith(_BY_LAYER)
            words.setdefault(known[0], {})[known[1]] = vectors[None] if by_layer else vectors[:, None]
    return words
