"""Opens files that are not trusted; errors become `FileError`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lora_compose.compose.support.names import file_near
from lora_compose.pipelines.regular import open_regular


class FileError(ValueError):
    """A file that cannot be read or written as asked; the message says where, what was expected and what was found."""


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
