"""Atomic writes: a file appears whole, under a new name or in place of another one, or not at all.

The unfinished file lies beside its destination, as `.lora-compose-*.part`, locked by its writer. The system releases
the lock when the writer dies, however it dies, so the next writer in this folder recognises abandoned files and removes
them.
"""

import errno
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows, which removes no file that a process has open, so nothing has to be locked
    fcntl = None

Content = bytes | Callable[[BinaryIO], None]
"""The content of a file, or a function that writes it."""

_PART = ".lora-compose-{}.part"


def write_whole(path: Path, data: Content) -> None:
    """Writes a file that replaces another one at once, or not at all. Raises OSError, which names `path`."""
    with _part(path, data) as part:
        part.replace(path)


def write_new(path: Path, data: Content, free_path: Callable[[Path], Path]) -> Path:
    """Writes a file that replaces no other one, and returns where; OSError if it cannot, which names `path`.

    `free_path` gives a free name, `path` itself where possible; it is asked again if another process was faster.
    """
    with _part(path, data) as part:
        taken = None
        while True:
            free = free_path(path)
            if free == taken:
                raise FileExistsError(errno.EEXIST, "there is something of that name already", str(free))
            try:
                os.link(part, free)  # unlike a rename, fails if another process was faster
            except FileExistsError:
                taken = free
                continue
            except OSError:  # a file system without links
                part.replace(free)
            return free


def check_writable(path: Path) -> None:
    """Checks by the folders that there are whether a file can be written; changes nothing.

    Raises:
        OSError: If one of them is no folder, or nothing may be written to it; the error names it.
    """
    above = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not above.is_dir():
        raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(above))
    if not os.access(above, os.W_OK | os.X_OK):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(above))


@contextmanager
def _part(path: Path, data: Content) -> Iterator[Path]:
    """A finished file beside its destination, to be moved there in one step; gone afterwards if it was not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path.parent.absolute())
    try:
        with _locked_file(path.parent) as part:
            with part.open("wb") as file:
                if isinstance(data, bytes):
                    file.write(data)
                else:
                    data(file)
                file.flush()
                os.fsync(file.fileno())  # else a power cut may leave the new name with nothing under it
            yield part
    except OSError as error:
        if error.filename2 is None:  # else a move has failed, and the error names both
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


@contextmanager
def _locked_file(folder: Path) -> Iterator[Path]:
    """A new file, locked until the block ends, and removed then if it was not moved away."""
    while True:
        part = folder / _PART.format(secrets.token_hex(8))
        with part.open("xb") as held:
            if fcntl is None:
                held.close()
            else:
                with suppress(OSError):  # a file system without locks, on which leftovers stay
                    fcntl.flock(held, fcntl.LOCK_EX)
                if not part.exists():  # another process took it for a leftover before it was locked
                    continue
            try:
                yield part
            finally:
                part.unlink(missing_ok=True)
            return


@cache
def _remove_leftovers(folder: Path) -> None:
    """Removes what dead processes have left in a folder; once in a process, when it first writes there."""
    for left in folder.glob(_PART.format("*")):
        with suppress(OSError):  # another one was faster, or it belongs to another user
            with left.open("r+b") as file:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while its writer lives
                    left.unlink()
            if fcntl is None:
                left.unlink()
