"""The log of a server: with the traceback of what failed, and bounded, however many clients send nonsense."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from lora_compose.compose.support.terminal import echo, err

# uvicorn's own two by name: where Streamlit was imported, each has a handler and does not propagate.
_LIBRARIES = ("lora_compose", "uvicorn", "uvicorn.error", "uvicorn.access", "asyncio", "diffusers", "transformers")
_MOST_OF_ONE = 8000  # letters of a record; of a longer traceback the end is kept


class BoundedLog(logging.Handler):
    """Prints records to stderr, and leaves out those that come too fast.

    `burst` letters may be printed at once, and `rate` a second in the long run; 100 are 8.6 MB a day.
    """

    def __init__(self, burst: int = 64 * 1024, rate: float = 100.0) -> None:
        super().__init__()
        self._burst, self._rate = burst, rate
        self._left, self._since, self._dropped = float(burst), time.monotonic(), 0

    def emit(self, record: logging.LogRecord) -> None:
        """Prints a record, or counts it."""
        text = self.format(record)
        if len(text) > _MOST_OF_ONE:
            text = f"{text[:200]}\n...\n{text[-_MOST_OF_ONE:]}"
        text = f"{record.levelname.lower()}: {text}"
        if self._dropped:
            text = f"warning: {self._dropped} records were left out; there were too many\n{text}"
        now = time.monotonic()
        self._left = min(float(self._burst), self._left + self._rate * (now - self._since))
        self._since = now
        if len(text) > self._left:
            self._dropped += 1
            return
        self._left -= len(text)
        self._dropped = 0
        echo(text, to=err)


@contextmanager
def bounded_log(log: logging.Handler | None = None) -> Iterator[None]:
    """Inside this block, what our packages and the libraries log goes to one bounded log."""
    log = log or BoundedLog()
    loggers = [logging.getLogger(name) for name in _LIBRARIES]
    before = [(logger.handlers, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [log], False
    try:
        yield
    finally:
        for logger, (handlers, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
