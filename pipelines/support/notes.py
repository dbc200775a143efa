"""Warnings about calls that are allowed but may surprise: logged in a call, values of a plan."""

import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache

logger = logging.getLogger(__name__)

_kept: ContextVar[list[str] | None] = ContextVar("warnings of a plan", default=None)


@contextmanager
def kept() -> Iterator[list[str]]:
    """Inside this block warnings of this thread are kept in a list, each once, and not logged."""
    found: list[str] = []
    token = _kept.set(found)
    try:
        yield found
    finally:
        _kept.reset(token)


def warn(message: str) -> None:
    """Warns in every call."""
    found = _kept.get()
    if found is None:
        logger.warning("%s", message)
    elif message not in found:
        found.append(message)


def warn_once(message: str) -> None:
    """Warns in the first call of a process."""
    if _kept.get() is None:
        log_once(message)
    else:
        warn(message)


def warn_first(about: Hashable, message: Callable[[], str]) -> None:
    """Warns in the first call of a process that is about this; later calls do not even make the message."""
    if _kept.get() is not None:
        warn(message())
    elif news := news_of(about):
        news.clear()
        logger.warning("%s", message())


@lru_cache(maxsize=1024)
def news_of(_about: Hashable) -> list[bool]:
    """A list with one entry until the warning about a subject was logged, empty afterwards."""
    return [True]


@lru_cache(maxsize=1024)
def log_once(message: str) -> None:
    """Logs a warning once per process."""
    logger.warning("%s", message)
