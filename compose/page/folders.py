"""Folders for the files of sessions: gone when the page ends, and if it was killed, when the next one starts."""

import atexit
import errno
import logging
import os
import shutil
import stat
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: what a killed page leaves there is left to the system
    fcntl: Any = None

logger = logging.getLogger(__name__)

PREFIX = "lora-compose-page-"
"""Prefix of the name of a page's folder, among the temporary files."""

_LOCK = "lock"
_making = threading.Lock()
_roots: list[Path] = []  # one at most


def new_folder() -> Path:
    """A new folder for one session, inside the folder of this process."""
    with _making:
        if not _roots:
            clean(Path(tempfile.gettempdir()))
            root = _new_root()
            atexit.register(shutil.rmtree, root, ignore_errors=True)
            _roots.append(root)
    return Path(tempfile.mkdtemp(dir=_roots[0]))


def clean(place: Path) -> None:
    """Removes folders of pages that were killed: named as ours, owned by this user, and not locked."""
    if fcntl is None:
        return
    for root in place.glob(f"{PREFIX}*"):
        with suppress(OSError):  # gone meanwhile, no folder, or not ours after all
            status = root.lstat()
            if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid():
                lock = _locked(root, os.O_RDWR)
                logger.info("%s is left of a page that was killed, and is removed", root)
                shutil.rmtree(root, ignore_errors=True)  # holding the lock, so that no other page starts to use it
                os.close(lock)


def _new_root() -> Path:
    """A new folder, locked until this process ends, however it ends."""
    while True:
        root = Path(tempfile.mkdtemp(prefix=PREFIX))
        if fcntl is None:
            return root
        try:
            _locked(root, os.O_RDWR | os.O_CREAT)
        except (BlockingIOError, FileNotFoundError):
            continue  # another page has just taken the lock, and removes the folder
        return root


def _locked(root: Path, flags: int) -> int:
    """The lock of a folder, held for as long as it is open.

    Raises:
        BlockingIOError: If another process has it.
        FileNotFoundError: If there is none.
    """
    lock = os.open(root / _LOCK, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock).st_nlink == 0:  # its last holder has removed the folder
            raise FileNotFoundError(errno.ENOENT, "the folder is gone", str(root))
    except OSError:
        os.close(lock)
        raise
    return lock
