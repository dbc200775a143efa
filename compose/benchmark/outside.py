"""How long a call of a pipeline takes outside of the forward passes of its model."""

from collections.abc import Callable, Sequence
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


def spent(model: Any, function: Callable[[], object], clocks: Sequence[Clock]) -> list[Spent]:
    """Runs a function that calls a pipeline with this model, and returns what it took by each clock.

    On CUDA it waits for the device before and after each pass, so that each side has its own work.
    """
    model, inside = uncompiled(model), [0.0] * len(clocks)

    def add(sign: int) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        for i, clock in enumerate(clocks):
            inside[i] += sign * clock()

    hooks = [
        model.register_forward_pre_hook(lambda *_: add(-1)),
        model.register_forward_hook(lambda *_: add(1), always_call=True),
    ]
    try:
        starts = [clock() for clock in clocks]
        function()
        ends = [clock() for clock in clocks]
    finally:
        for hook in hooks:
            hook.remove()
    return [Spent(end - start - within, within) for start, end, within in zip(starts, ends, inside, strict=True)]
