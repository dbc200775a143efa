"""Folders of this machine for the files of processes, removed when these are dead, however they died.

A lock file lies beside each folder, and every process that uses the folder has it locked. The system releases the lock
when a process dies, so whoever comes next recognises what a killed one has left.
"""

import atexit
import os
import secrets
import shutil
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows, where what killed processes leave stays
    fcntl = None

_PREFIX, _LOCK = "lora-compose-", ".lock"
SECONDS_TO_DIE = 5.0


@dataclass(frozen=True)
class HeldFolder:
    """A folder that is not removed while this process lives and keeps this object."""

    path: Path
    _lock: BinaryIO
    _is_locked: bool

    def remove(self) -> None:
        """Removes it, unless another process holds it as well; without locks, that is not known."""
        self._lock.close()
        lock = _lock_of(self.path)
        if self._is_locked:
            _removed(lock)
            return
        shutil.rmtree(self.path, ignore_errors=True)
        with suppress(OSError):  # another process of Windows has it open
            lock.unlink()


def of_this_process(kind: str) -> Path:
    """A folder of this process alone, removed at its end, and if it was killed, by the next one that holds a folder."""
    return _of_process(kind, os.getpid())


@cache  # threads that come at the same time may get a folder each: both are removed at the end
def _of_process(kind: str, process: int) -> Path:
    held = hold(f"{kind}-{secrets.token_hex(8)}")
    atexit.register(_remove_in, process, held)
    return held.path


def _remove_in(process: int, held: HeldFolder) -> None:
    """Removes a folder in the process that it is of; processes forked from it end with the same calls."""
    if os.getpid() == process:
        held.remove()


def hold(name: str) -> HeldFolder:
    """A folder of this name, new or held by other processes too; removes folders that dead ones have left.

    Raises:
        PermissionError: If it belongs to another user.
    """
    remove_abandoned()
    folder = Path(tempfile.gettempdir()) / f"{_PREFIX}{name}"
    while True:
        lock, is_locked = _opened(_lock_of(folder)), False
        if fcntl is not None:
            with suppress(OSError):  # a file system without locks, on which what dead processes leave stays
                fcntl.flock(lock, fcntl.LOCK_SH)
                is_locked = True
        if _is_there(lock, _lock_of(folder)):
            break
        lock.close()  # it was removed before it was locked
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or not _is_own(folder.stat()):
        raise PermissionError(f"{folder} belongs to another user")
    return HeldFolder(folder, lock, is_locked)


def remove(folder: str) -> None:
    """Removes a folder whose processes have been killed, and those that others have left on this machine."""
    patience = time.monotonic() + SECONDS_TO_DIE
    while not _removed(_lock_of(Path(folder))) and time.monotonic() < patience:
        time.sleep(0.05)
    shutil.rmtree(folder, ignore_errors=True)  # also where there are no locks
    remove_abandoned()


def remove_abandoned() -> None:
    """Removes the folders of this user that no living process holds."""
    if fcntl is not None:
        for lock in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*{_LOCK}"):
            _removed(lock)


def _removed(lock: Path) -> bool:
    """Whether the folder of a lock file is gone; removes it unless somebody holds it or it is another user's."""
    try:
        with _opened(lock, new=False) as file:
            if not _is_own(os.fstat(file.fileno())):
                return False
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            if fcntl is not None:
                lock.unlink()
    except FileNotFoundError:
        return True
    except OSError:  # it is held
        return False
    if fcntl is None:
        lock.unlink(missing_ok=True)
    return True


def _lock_of(folder: Path) -> Path:
    return folder.with_name(folder.name + _LOCK)


def _opened(lock: Path, *, new: bool = True) -> BinaryIO:
    flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | (os.O_CREAT if new else 0)
    return os.fdopen(os.open(lock, flags, 0o600), "r+b")


def _is_there(lock: BinaryIO, path: Path) -> bool:
    """Whether a lock file that is open still has its name."""
    try:
        return os.path.samestat(os.fstat(lock.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _is_own(about: os.stat_result) -> bool:
    return not hasattr(os, "getuid") or about.st_uid == os.getuid()
