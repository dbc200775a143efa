"""Work that any number of processes share through a folder: what one has claimed, the others leave alone.

A claim is a file that only one process can create. Its owner touches it every few seconds; where that stops, because
the process, its machine or its disk has died, another process may take the work over. There is no server, and clocks
need not agree: a claim is judged by whether it changes while one looks at it.

Each time that work is taken over, it gets a further file, `NAME.1` after `NAME.0`: nothing is renamed or replaced, so
there is no moment in which two processes could both believe that they were first. An owner that had only been slow
sees at the end that its claim has passed to another.
"""

import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PATIENCE = 60.0
"""Seconds without a heartbeat after which a process counts as dead."""

_NUMBERED = re.compile(r"(.+)\.(\d+)")


class FileClaim:
    """Work that this process has claimed."""

    def __init__(self, folder: Path, name: str, number: int) -> None:
        self._folder, self._name, self._number = folder, name, number

    @property
    def path(self) -> Path:
        """The file."""
        return _path(self._folder, self._name, self._number)

    @property
    def held(self) -> bool:
        """Whether no other process has taken the work over."""
        return self.path.exists() and not _path(self._folder, self._name, self._number + 1).exists()


class Claims:
    """The claims in a folder, which need not be there, as one process sees them.

    After `patience` seconds without a sign of life a claim may be taken over.
    """

    def __init__(self, folder: Path, patience: float = PATIENCE) -> None:
        self._folder, self._patience = folder, patience
        self._seen: dict[str, tuple[tuple[int, int], float]] = {}

    @contextmanager
    def claim(self, name: str) -> Iterator[FileClaim | None]:
        """Claims work by a file name until the block ends; None if another process has. OSError if nothing is writable.

        Whether it has been done meanwhile is to be looked at under the claim.
        """
        taken = self._take(name)
        if taken is None:
            yield None
            return
        ended = threading.Event()
        beat = threading.Thread(target=self._keep_alive, args=(taken.path, ended), daemon=True)
        beat.start()
        try:
            yield taken
        finally:
            ended.set()
            beat.join()
            taken.path.unlink(missing_ok=True)

    def _take(self, name: str) -> FileClaim | None:
        self._folder.mkdir(parents=True, exist_ok=True)
        number = self._free_number(name)
        if number is None:
            return None
        taken = FileClaim(self._folder, name, number)
        try:
            with taken.path.open("x", encoding="utf-8") as file:
                file.write(f"{socket.gethostname()} {os.getpid()}\n")
        except FileExistsError:  # another one was faster
            return None
        for older in range(number):
            _path(self._folder, name, older).unlink(missing_ok=True)
        return taken

    def _free_number(self, name: str) -> int | None:
        """The number that a new claim would get; None while an owner may be alive."""
        matches = (_NUMBERED.fullmatch(path.name) for path in self._folder.iterdir())
        numbers = [int(match[2]) for match in matches if match and match[1] == name]
        if not numbers:
            return 0
        number = max(numbers)
        try:
            state = number, _path(self._folder, name, number).stat().st_mtime_ns
        except FileNotFoundError:  # just ended; look again
            return None
        now = time.monotonic()
        if self._seen.get(name, (None,))[0] != state:
            self._seen[name] = state, now
        return number + 1 if now - self._seen[name][1] >= self._patience else None

    def _keep_alive(self, path: Path, ended: threading.Event) -> None:
        while not ended.wait(self._patience / 6):
            with suppress(OSError):  # a disk that is away for a moment, or a claim that was taken over
                os.utime(path)


def _path(folder: Path, name: str, number: int) -> Path:
    return folder / f"{name}.{number}"
