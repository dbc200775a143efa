"""Ctrl-C in a training: it stops after the current step, so that the checkpoint is complete."""

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
    """Records Ctrl-C and SIGTERM in this block; a second signal has its usual effect.

    Outside the main thread signals cannot be caught, so nothing is recorded.
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
