"""Work that processes share in pieces: each is claimed, and done by this process or by the workers of a cluster."""

import logging
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol

from lora_compose.compose.cluster.packing import THIS_MACHINE, Node
from lora_compose.compose.files.claims import Claims, FileClaim
from lora_compose.compose.support.errors import error_text

logger = logging.getLogger(__name__)

LOOK_AGAIN = 0.5
"""Seconds after which a process that waits for others looks again."""

OnProgress = Callable[..., None]
"""Called with the number of finished pieces, fractions included, and sometimes a new text."""

Opening = Callable[[Node], Any]
"""Opens what a worker works with. Pickled: a function of a module, or a `partial` of one."""

Function = Callable[..., Iterable[Any]]
"""A function of a module or class: called with what has been opened and the arguments of a call; gives results."""


class Piece(Protocol):
    """A piece of work with its files."""

    def arguments(self) -> tuple | None:
        """The arguments of its call; None if another process has done it, or has just failed at it."""

    def keep(self, result: Any) -> None:
        """Stores a result of its call."""

    def keep_failure(self, error: str) -> None:
        """Stores why its call has no further results."""


Ended = tuple[str, Iterable[Any]]
"""A call that has ended, by its name, and its results, of which the last is a `Failure` if it has failed."""


@dataclass(frozen=True)
class Failure:
    """Why a call has failed."""

    error: str


@dataclass(frozen=True)
class Call:
    """A call of a function. In this process it also gets `on_progress`, unless that is None."""

    name: str
    function: Function
    arguments: tuple
    on_progress: Callable[[float], None] | None = None


@dataclass
class Progress:
    """The number of finished pieces, reported as it grows."""

    report: OnProgress
    done: int

    def share(self, share: float) -> None:
        """Reports a fraction of the next piece."""
        self.report(self.done + share)

    def count(self) -> None:
        """Counts a piece, and reports it."""
        self.done += 1
        self.report(self.done)


class Workers(ABC):
    """Workers that have opened the same; each does one call at a time."""

    @abstractmethod
    def is_free(self) -> bool:
        """Whether a worker can begin a call."""

    @abstractmethod
    def begin(self, call: Call) -> None:
        """Gives a call to a free worker."""

    @abstractmethod
    def ended(self) -> Iterator[Ended]:
        """Waits a moment; yields calls that have ended."""

    def map(self, function: Function, tasks: Mapping[str, tuple]) -> Iterator[Ended]:
        """Calls a function with the arguments of each task; yields them in the order in which they end.

        Raises ValueError if what the workers need cannot be opened, and OSError if no worker is left.
        """
        waiting, running = deque(tasks.items()), 0
        while waiting or running:
            while waiting and self.is_free():
                name, arguments = waiting.popleft()
                self.begin(Call(name, function, arguments))
                running += 1
            for ended in self.ended():
                running -= 1
                yield ended

    def work(
        self, function: Function, claims: Claims, pieces: Mapping[str, Piece], progress: Progress | None = None
    ) -> None:
        """Does pieces of work, those that others have claimed last, until all have been done by anyone.

        Raises as `map`, and OSError if claims or results cannot be written.
        """
        on_progress, count = (None, lambda: None) if progress is None else (progress.share, progress.count)
        fresh, taken = deque(pieces), list[str]()
        held: dict[str, tuple[ExitStack, FileClaim]] = {}
        with ExitStack() as stacks:
            stacks.callback(lambda: [stack.close() for stack, _ in held.values()])
            while fresh or taken or held:
                while fresh and self.is_free():
                    name = fresh.popleft()
                    with ExitStack() as stack:
                        claim = stack.enter_context(claims.claim(name))
                        if claim is None:
                            taken.append(name)
                        elif (arguments := pieces[name].arguments()) is not None:
                            held[name] = stack.pop_all(), claim
                            self.begin(Call(name, function, arguments, on_progress))
                        else:
                            count()
                if not fresh:
                    fresh, taken = deque(taken), []
                for name, results in self.ended() if fresh or held else ():
                    stack, claim = held.pop(name)
                    with stack:
                        keep(name, pieces[name], results, claim)
                    count()


class ThisProcess(Workers):
    """This process as the only worker, on a machine that has all files; opens what it needs at its first call."""

    def __init__(self, opening: Opening) -> None:
        self._opening = opening
        self._call: Call | None = None

    @cached_property
    def _opened(self) -> Any:
        return self._opening(THIS_MACHINE)

    def is_free(self) -> bool:
        """Whether no call has begun."""
        return self._call is None

    def begin(self, call: Call) -> None:
        """Notes a call, which is made as its results are asked for."""
        self._call = call

    def ended(self) -> Iterator[Ended]:
        """Yields the call that has begun; waits a moment for other processes if there is none."""
        if self._call is None:
            time.sleep(LOOK_AGAIN)
            return
        call, self._call = self._call, None
        function = partial(call.function, on_progress=call.on_progress) if call.on_progress else call.function
        yield call.name, attempt(function, self._opened, *call.arguments)


def attempt(function: Function, *arguments: Any) -> Iterator[Any]:
    """The results of a call as they come; an error becomes a `Failure`, the last of them."""
    try:
        yield from function(*arguments)
    except Exception as error:  # models and libraries may raise anything
        logger.debug("a call has failed", exc_info=True)
        yield Failure(error_text(error))


def keep(name: str, piece: Piece, results: Iterable[Any], claim: FileClaim) -> None:
    """Stores results as they come. If another process has taken the piece over meanwhile, its results stand."""
    for result in results:
        if not claim.held:
            logger.warning("%s was taken over by another process: this one had given no sign of life", name)
            return
        if isinstance(result, Failure):
            piece.keep_failure(result.error)
        else:
            piece.keep(result)
