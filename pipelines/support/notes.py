"""Warnings about calls that are allowed but may surprise: logged in a call, values of a plan."""

import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

logger = logging.getLogger(__name__)

MOST_LOGGED = 1024
logged: set[Hashable] = set()  # what warnings of this process were about

_kept: ContextVar[list[str] | None] = ContextVar("warnings of a plan", default=None)
_held: ContextVar[list[Callable[[], None]] | None] = ContextVar("warnings of a call that may be refused", default=None)


@contextmanager
def kept() -> Iterator[list[str]]:
    """Inside this block warnings of this thread are kept in a list, each once, and not logged."""
    messages: list[str] = []
    token = _kept.set(messages)
    try:
        yield messages
    finally:
        _kept.reset(token)


@contextmanager
def held() -> Iterator[None]:
    """Inside this block warnings wait for its end; if it raises, there are none."""
    waiting: list[Callable[[], None]] = []
    token = _held.set(waiting)
    try:
        yield
    finally:
        _held.reset(token)
    for warns in waiting:
        warns()


def warn(message: str) -> None:
    """Warns in every call."""
    if (waiting := _held.get()) is not None:
        waiting.append(partial(warn, message))
        return
    messages = _kept.get()
    if messages is None:
        logger.warning("%s", message)
    elif message not in messages:
        messages.append(message)


def warn_once(message: str) -> None:
    """Warns in the first call of a process."""
    warn_first(message, lambda: message)


def warn_first(about: Hashable, message: Callable[[], str]) -> None:
    """Warns in the first call of a process that is about this; later calls do not even make the message."""
    if (waiting := _held.get()) is not None:
        waiting.append(partial(warn_first, about, message))
    elif _kept.get() is not None:
        warn(message())
    elif about not in logged:
        if len(logged) == MOST_LOGGED:
            logged.clear()  # bounded in a server that runs for months; some warnings come again
        logged.add(about)
        logger.warning("%s", message())
