"""Terminal output of the commands: messages, progress, and errors without tracebacks."""

import functools
import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import typer
from rich.console import Console

from lora_compose.compose.support.spelling import as_options

_P = ParamSpec("_P")
_R = TypeVar("_R")
_T = TypeVar("_T")

out = Console(highlight=False, emoji=False)
err = Console(highlight=False, emoji=False, stderr=True)

BAD_INPUT, FAILED = 2, 1


def plain(text: object) -> str:
    """Text that is safe to print: control characters, and those that reverse the writing direction, are escaped.

    Names and prompts are the user's data; those in images are not trusted.
    """
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in str(text))


def echo(*words: object, style: str | None = None, to: Console = out) -> None:
    """Prints text as it is, without markup and without breaking lines."""
    to.print(plain(" ".join(map(str, words))), style=style, markup=False, soft_wrap=True)


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        label = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        echo(f"{label}{as_options(record.getMessage())}", style="yellow" if label else "dim", to=err)


@contextmanager
def logged(level: int) -> Iterator[None]:
    """Shows the log of our own packages in this block."""
    logger = logging.getLogger("lora_compose")
    handler, before = _Handler(), logger.level
    handler.setLevel(level)
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


EVERY = 5.0
"""Seconds between two lines of progress where there is no terminal; later a twentieth of the time so far, at most
`MOST`."""
MOST = 60.0


@contextmanager
def bar(text: str, total: float | None = None) -> Iterator[Callable[..., None]]:
    """Shows progress on stderr, with the time left: as a bar in a terminal, elsewhere as a line every few seconds.

    Yields a function that takes the amount of `total` that is done, and optionally a new text. None is an unknown
    amount.
    """
    with (_drawn if err.is_terminal else _printed)(plain(text), total) as update:
        yield update


def bar_over(text: str, items: Collection[_T], do: Callable[[_T], _R]) -> list[_R]:
    """What a function gives for each item, with progress."""
    results = []
    with bar(text, len(items)) as on_progress:
        for item in items:
            results.append(do(item))
            on_progress(len(results))
    return results


@contextmanager
def starting() -> Iterator[None]:
    """Shows that something happens while a command imports torch, diffusers and transformers, which takes seconds."""
    with bar("starting"):
        yield


@contextmanager
def _drawn(text: str, total: float | None) -> Iterator[Callable[..., None]]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    left = () if total is None else (TextColumn("left"), TimeRemainingColumn())
    # Time left by all of the work so far: of calls that take unequally long, those of the last seconds tell little.
    with Progress(*columns, *left, console=err, transient=True, speed_estimate_period=math.inf) as progress:
        task = progress.add_task(text, total=total)

        def update(done: float, text: str | None = None) -> None:
            progress.update(task, completed=done, description=None if text is None else plain(text))

        yield update


@contextmanager
def _printed(text: str, total: float | None) -> Iterator[Callable[..., None]]:
    begun, ended = time.monotonic(), threading.Event()
    state: tuple[float, str] = (0.0, text)
    first: tuple[float, float] | None = None

    def update(done: float, text: str | None = None) -> None:
        nonlocal state, first
        if first is None:
            first = done, time.monotonic() - begun
        state = done, state[1] if text is None else plain(text)

    def report() -> None:
        while not ended.wait(min(max(EVERY, (time.monotonic() - begun) / 20), MOST)):
            done, text = state
            seconds = time.monotonic() - begun
            echo(progress_line(text, done, total, seconds, first or (0.0, 0.0)), style="dim", to=err)

    reporter = threading.Thread(target=report, daemon=True)
    reporter.start()
    try:
        yield update
    finally:
        ended.set()
        reporter.join()


def progress_line(
    text: str, done: float, total: float | None, seconds: float, first: tuple[float, float] = (0.0, 0.0)
) -> str:
    """One line of progress: "composing: 25 %, 0:20 so far, about 1:00 left".

    `first` is what was done at the first report, and after how many seconds. The time left goes by what was done since,
    as in a terminal: work that is resumed begins with much that is done.
    """
    if not total:
        return f"{text}: {_clock(seconds)} so far"
    share = min(done / total, 1.0)
    since, begun = first
    left = f", about {_clock((seconds - begun) / (done - since) * max(total - done, 0))} left" if done > since else ""
    return f"{text}: {share:.0%}, {_clock(seconds)} so far{left}"


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def handle_errors(level: int = logging.INFO) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Makes a command end with 2 for usage errors and 1 for failures, without a traceback; logs from `level` on."""

    def decorate(command: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(command)
        def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            try:
                with logged(level):
                    return command(*args, **kwargs)
            except ValueError as error:
                raise _ended("error", error, BAD_INPUT) from error
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                hint = (
                    "use a smaller --width and --height, --dtype float16, --save-memory, or --device cpu (run --help)"
                )
                lines = [str(error).splitlines()[0], *getattr(error, "__notes__", ()), hint]
                raise _ended("out of memory", "\n".join(lines), FAILED) from error
            except OSError as error:
                raise _ended("failed", error, FAILED) from error

        return wrapped

    return decorate


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch ran out of memory; it may not even have been imported."""
    return "torch" in sys.modules and isinstance(error, sys.modules["torch"].OutOfMemoryError)


def _ended(label: str, message: Any, code: int) -> typer.Exit:
    echo(f"{label}: {as_options(str(message))}", style="red", to=err)
    return typer.Exit(code)
