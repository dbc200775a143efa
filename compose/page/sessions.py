"""Sessions end when their browser has gone: their work is stopped, and their files are deleted."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

logger = logging.getLogger(__name__)

GRACE = 20.0
"""Seconds that a browser may be away, because of a network error or a reload."""

EVERY = 2.0
"""Seconds between two checks."""


PATIENCE = 5.0
"""Seconds for running work to stop when the page itself ends; torch aborts a process that ends during a call."""


class Closing(Protocol):
    """Something that ends with its session."""

    def close(self) -> bool:
        """Ends it; True once nothing is left of it."""
        ...


@dataclass(eq=False)
class _Open:
    session_id: str
    session: Closing
    seen: float  # when its browser was last connected


class Sessions:
    """All open sessions. A thread checks them, from the first one on.

    Streamlit does not report that a browser has gone (closed, killed or cut off), but whether one is connected.

    Args:
        is_there: Whether a session has a browser, by the session's name.
        grace: How long a browser may be away, in seconds.
        every: Time between two checks, in seconds.
    """

    def __init__(self, is_there: Callable[[str], bool], grace: float = GRACE, every: float = EVERY) -> None:
        self._is_there, self._grace, self._every = is_there, grace, every
        self._open: list[_Open] = []
        self._ending: list[Closing] = []
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, session_id: str, session: Closing) -> None:
        """Adds a session. An earlier one of the same browser session ends."""
        with self._lock:
            self._end([entry for entry in self._open if entry.session_id == session_id])
            self._open.append(_Open(session_id, session, time.monotonic()))
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="lora-compose-sessions", daemon=True)
                self._thread.start()

    def move(self, session: Closing, session_id: str) -> bool:
        """Lets a session go on in another browser session, as after a reload, if its own browser has gone.

        Returns:
            Whether it goes on; not if it has ended or still has a browser.
        """
        with self._lock:
            moved = next((entry for entry in self._open if entry.session is session), None)
            if moved is None or self._is_there(moved.session_id):
                return False
            self._end([entry for entry in self._open if entry.session_id == session_id and entry is not moved])
            moved.session_id, moved.seen = session_id, time.monotonic()
            return True

    def look(self) -> None:
        """Ends the sessions whose browsers have been away for too long."""
        with self._lock:
            now = time.monotonic()
            for entry in self._open:
                if self._is_there(entry.session_id):
                    entry.seen = now
            self._end([entry for entry in self._open if now - entry.seen > self._grace])
            self._ending = [session for session in self._ending if not _closed(session)]  # the others at the next check

    def end(self, patience: float = PATIENCE) -> None:
        """Ends all sessions because the page ends; waits at most `patience` seconds for them."""
        with self._lock:
            self._end(self._open)
        until = time.monotonic() + patience
        self.look()
        while self._ending and time.monotonic() < until:
            time.sleep(0.05)
            self.look()

    def _end(self, gone: list[_Open]) -> None:
        self._open = [entry for entry in self._open if entry not in gone]
        self._ending += [entry.session for entry in gone]

    def _watch(self) -> None:
        while True:
            time.sleep(self._every)
            try:
                self.look()
            except Exception:  # it has to continue for the others
                logger.exception("looking after the sessions failed")


def _closed(session: Closing) -> bool:
    try:
        return session.close()
    except Exception:
        logger.exception("a session could not be ended; it is tried again")
        return False
