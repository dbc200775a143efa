"""Facts that a program stores for itself, as JSON: each file appears whole or not at all."""

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from lora_compose.compose.files.atomic import write_whole
from lora_compose.compose.files.reading import FILE_LIMIT, FileError
from lora_compose.pipelines.support.regular import open_regular, sha256_of

_Stored = TypeVar("_Stored", bound=BaseModel)


def write(path: Path, stored: BaseModel) -> None:
    """Writes a file in one step; raises OSError if it cannot be written; nothing is left behind."""
    write_text(path, stored.model_dump_json(indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes text in one step; raises OSError if it cannot be written; nothing is left behind."""
    write_whole(path, text.encode())


def read(path: Path, kind: type[_Stored]) -> _Stored | None:
    """Reads a file; None if it is not there. Raises FileError if it is unreadable or damaged."""
    try:
        with open_regular(path) as file:
            data = file.read(FILE_LIMIT + 1)
        if len(data) > FILE_LIMIT:
            raise FileError(f"{path} is larger than {FILE_LIMIT} bytes")
        return kind.model_validate_json(data)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValidationError as error:
        raise FileError(f"{path} is damaged") from error


def holds(path: Path, sha256: str | None) -> bool:
    """Whether a file is there and has this SHA-256; False if it cannot be read."""
    try:
        return sha256_of(path) == sha256
    except OSError:
        return False


def changed(path: Path) -> int | None:
    """When a file was last written, in nanoseconds; None if it is not there."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None
