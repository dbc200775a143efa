"""How long a call of a pipeline takes outside of the forward passes of its model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from lora_compose.attention.device import uncompiled

Clock = Callable[[], float]


@dataclass(frozen=True)
class Spent:
    """Seconds of a call by one clock: outside of forward passes of the model, and inside of them."""

    outside: float
    inside: float


@contextmanager
def around_passes(model: Any, before: Callable[..., None], after: Callable[..., None]) -> Iterator[None]:
    """Calls functions before and after each forward pass of a model; the first gets its arguments, as a hook does."""
    model = uncompiled(model)
    hooks = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, always_call=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def spent(model: Any, function: Callable[[], object], clocks: Sequence[Clock]) -> list[Spent]:
    """Runs a function that calls a pipeline with this model, and returns what it took by each clock.

    On CUDA it waits for the device before and after each pass, so that each side has its own work.
    """
    inside = [0.0] * len(clocks)

    def add(sign: int) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        for i, clock in enumerate(clocks):
            inside[i] += sign * clock()

    with around_passes(model, lambda *_: add(-1), lambda *_: add(1)):
        starts = [clock() for clock in clocks]
        function()
        ends = [clock() for clock in clocks]
    return [Spent(end - start - within, within) for start, end, within in zip(starts, ends, inside, strict=True)]
