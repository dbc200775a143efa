"""Opens files that are not trusted; errors become `FileError`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lora_compose.compose.support.names import file_near
from lora_compose.pipelines.support.regular import open_regular

FILE_LIMIT = 256 * 2**20
"""Bytes of the largest file that is read whole, where nothing smaller is said."""


class FileError(ValueError):
    """A file that cannot be read or written as asked; the message says where, what was expected and what was found."""


def read_whole(path: Path, limit: int = FILE_LIMIT, advice: str = "") -> bytes:
    """The content of a file; of one that is too large, no more than the limit is read.

    Raises:
        FileError: If it is missing, unreadable, or has more bytes than the limit; the last message ends in `advice`.
    """
    with open_file(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise FileError(f"{path} is larger than {limit} bytes{advice}")
    return data


def read_text(path: Path, limit: int, advice: str) -> str:
    """The text of a file in UTF-8, as `read_whole`."""
    data = read_whole(path, limit, advice)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise FileError(f"{path}, line {line}: not UTF-8 text: {data[error.start]:#04x}; save it as UTF-8") from error


@contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a regular file; a pipe or device would block."""
    try:
        with open_regular(path) as file:
            yield file
    except FileNotFoundError as error:
        raise FileError(f"there is no file {str(path)!r}{file_near(path)}") from error
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}") from error
