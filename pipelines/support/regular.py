"""Opens files at untrusted paths: only regular files, and without waiting on pipes or devices."""

import errno
import hashlib
import os
import stat
from io import BufferedReader
from pathlib import Path


def open_regular(path: Path) -> BufferedReader:
    """Opens a regular file for reading, without blocking on anything else.

    Opening a pipe waits for a writer, and a device may never end. The open file is checked, not the path, which could
    change in between. Raises OSError if it cannot be opened, or is a folder, pipe, socket or device, also behind a
    link.
    """
    file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115 (the caller closes it)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is not a regular file but a pipe or a device", str(path))
    return file


def sha256_of(path: Path) -> str:
    """The SHA-256 of a regular file, in hexadecimal digits."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _without_waiting(path: str, flags: int) -> int:
    # Windows has neither flag, and no pipes among its files
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))
