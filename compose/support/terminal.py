"""What the commands share: saying things, progress, and errors without tracebacks."""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import diffusers.utils.logging
import torch
import transformers.utils.logging
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_P = ParamSpec("_P")
_R = TypeVar("_R")

out = Console(highlight=False, emoji=False)
err = Console(highlight=False, emoji=False, stderr=True)

BAD_INPUT, FAILED = 2, 1


def plain(text: object) -> str:
    """Text as one may show it: characters that steer a terminal or reverse the writing are spelled out.

    Names and prompts are the user's data, and those in images a stranger's.
    """
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in str(text))


def say(*words: object, style: str | None = None, to: Console = out) -> None:
    """Prints text as it is, without markup and without breaking lines."""
    to.print(plain(" ".join(map(str, words))), style=style, markup=False, soft_wrap=True)


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        label = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        say(f"{label}{record.getMessage()}", style="yellow" if label else "dim", to=err)


@contextmanager
def logged(level: int) -> Iterator[None]:
    """Shows what our own packages log, and keeps the bars of the libraries below away."""
    logger = logging.getLogger("lora_compose")
    handler, before = _Handler(), logger.level
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    handler.setLevel(level)
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


@contextmanager
def bar(text: str, total: int) -> Iterator[Callable[..., None]]:
    """A progress bar with the time left.

    Args:
        text: What is being done.
        total: How much there is to do.

    Yields:
        What takes how much is done, fractions included, and a new text if there is one.
    """
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn(), TextColumn("left"))
    with Progress(*columns, TimeRemainingColumn(), console=err, transient=True) as progress:
        task = progress.add_task(plain(text), total=total)

        def update(done: float, text: str | None = None) -> None:
            progress.update(task, completed=done, description=None if text is None else plain(text))

        yield update


def kindly(level: int = logging.INFO) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Makes a command answer mistakes with a message and exit code 2, failures with a message and exit code 1.

    Args:
        level: From which level on the log is shown.
    """

    def decorate(command: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(command)
        def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            try:
                with logged(level):
                    return command(*args, **kwargs)
            except ValueError as error:
                raise _ended("error", error, BAD_INPUT) from error
            except torch.OutOfMemoryError as error:
                hint = (
                    "use a smaller --width and --height, --dtype float16, --save-memory, or --device cpu (run --help)"
                )
                lines = [str(error).splitlines()[0], *getattr(error, "__notes__", ()), hint]
                raise _ended("out of memory", "\n".join(lines), FAILED) from error
            except OSError as error:
                raise _ended("failed", error, FAILED) from error

        return wrapped

    return decorate


def _ended(label: str, message: Any, code: int) -> typer.Exit:
    say(f"{label}: {message}", style="red", to=err)
    return typer.Exit(code)
