"""Ctrl-C in a training: it stops after the step that is being made, so that the checkpoint is a whole one."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class StopRequest:
    """Whether the user has asked to stop."""

    received: bool = False


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Takes note of Ctrl-C and of a polite kill inside this block; the second time they do what they always do.

    Outside the main thread signals cannot be caught, and nothing is.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: Any) -> None:
        request.received = True
        signal.signal(number, before[number] or signal.SIG_DFL)

    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
