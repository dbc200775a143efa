"""Who uses a model, and what has yet to be undone in it.

A call claims its models from its first line to its last: any number of calls may read a model at a time, and one alone
may change it. A change is noted in the model's journal before it is made, and the note goes when it has been undone.
Ctrl-C may come at any time, also while changes are being undone: then this is finished at once, and if that is
interrupted as well, before the next claim.
"""

import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from torch import nn

from lora_compose.attention.device import uncompiled

ClaimKind = Literal["read", "compose", "install"]
"""A call without concepts; one with concepts; LoRAs put into a model, by themselves or by a call with concepts."""


class Journal:
    """The changes of a model that have yet to be undone, the latest last."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], Any]] = []

    def __len__(self) -> int:
        return len(self._undo)

    def callback(self, undo: Callable[..., Any], *args: Any) -> None:
        """Notes how a change is undone, before it is made. An interrupted `undo` runs again from its start."""
        self._undo.append(partial(undo, *args))

    def undo_to(self, length: int) -> None:
        """Undoes changes, the latest first, until so many are left; if it is interrupted, another call goes on."""
        while len(self._undo) > length:
            self._undo[-1]()
            self._undo.pop()


@dataclass(eq=False)
class _Use:
    """The claims on a model, and its journal."""

    claims: list["Claim"] = field(default_factory=list)
    journal: Journal = field(default_factory=Journal)


_uses: weakref.WeakKeyDictionary[nn.Module, _Use] = weakref.WeakKeyDictionary()
_lock = threading.RLock()


def _use_of(model: nn.Module) -> _Use:
    with _lock:
        return _uses.setdefault(uncompiled(model), _Use())


@contextmanager
def undoing(model: nn.Module) -> Iterator[Journal]:
    """Inside this block a model may be changed; what its journal gets is undone at the end of the block."""
    journal = _use_of(model).journal
    length = len(journal)
    try:
        yield journal
    finally:
        try:
            journal.undo_to(length)
        finally:
            journal.undo_to(length)  # if Ctrl-C came in between


class Claim:
    """A call's claim on its models.

    `end` belongs into two `finally`, one around the other, so that it is finished if Ctrl-C comes during the first.
    """

    def __init__(self, models: Iterable[nn.Module], kind: ClaimKind) -> None:
        self._models = tuple(models)
        self._kind = kind
        self._thread = threading.get_ident()
        self._held: list[tuple[_Use, int]] = []
        self._over = False

    def take(self) -> None:
        """Claims all models, or none of them.

        Raises:
            RuntimeError: If another call changes one of them, or reads one that this call would change.
        """
        with _lock:
            uses = [_use_of(model) for model in self._models]
            others = list(dict.fromkeys(other for use in uses for other in tuple(use.claims)))
            if any(map(self._excludes, others)):
                raise RuntimeError("this model is making another image right now; wait for it or use a second pipeline")
            for other in others:
                if other._over:
                    other.end()
            self._held = [(use, len(use.journal)) for use in uses]
            for use in uses:
                use.claims.append(self)

    def end(self) -> None:
        """Undoes what has been changed since, and gives the models back; without a claim it does nothing."""
        self._over = True
        for use, length in self._held:
            if self in use.claims:
                if self._kind != "read":
                    use.journal.undo_to(length)
                use.claims.remove(self)

    def _excludes(self, other: "Claim") -> bool:
        if self._kind == other._kind == "read":
            return False
        same_thread = other._thread == self._thread
        if other._over:  # what it changed is being undone in its thread, or that was interrupted
            return other._kind != "read" and not same_thread and other._thread in sys._current_frames()
        if not (same_thread and other._kind == "compose"):
            return True
        # A call with concepts may make plain images, to merge files by them, before it changes anything.
        return not (self._kind == "install" or (self._kind == "read" and other._has_changed_nothing()))

    def _has_changed_nothing(self) -> bool:
        return all(len(use.journal) == length for use, length in self._held)


@contextmanager
def claimed(models: Iterable[nn.Module], kind: ClaimKind) -> Iterator[None]:
    """Inside this block models are claimed."""
    claim = Claim(models, kind)
    try:
        try:
            claim.take()
            yield
        finally:
            claim.end()
    finally:
        claim.end()
