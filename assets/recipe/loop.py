"""The training loop of the playground's networks: learning rates, checkpoints, progress."""

import io
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.nn import Parameter

from lora_compose.compose.files.atomic import write_whole
from lora_compose.compose.support.terminal import echo
from recipe.muon import Muon
from recipe.ranks import average_gradients, rank

EVERY = 100  # steps between checkpoints


class Optimizers:
    """Muon for what has two or more dimensions, AdamW with a tenth of the rate for the rest.

    Args:
        inner: Matrices and convolutions.
        rest: Vectors, embeddings and what else is no map between features.
        lr: Muon's learning rate.
        weight_decay: Muon's.
        betas: AdamW's.
    """

    def __init__(
        self,
        inner: Sequence[Parameter],
        rest: Sequence[Parameter],
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.98),
    ) -> None:
        muon = Muon(inner, lr=lr, weight_decay=weight_decay)
        adam = torch.optim.AdamW(rest, lr=lr / 10, betas=betas, weight_decay=weight_decay / 20)
        self._pairs = [(muon, lr), (adam, lr / 10)]

    def step(self, share: float) -> None:
        """One step with a share of the learning rates; the gradients are gone afterwards."""
        average_gradients(p for optimizer, _ in self._pairs for p in optimizer.param_groups[0]["params"])
        for optimizer, lr in self._pairs:
            optimizer.param_groups[0]["lr"] = lr * share
            optimizer.step()
            optimizer.zero_grad()

    def state_dict(self) -> list[dict[str, Any]]:
        """The state for a checkpoint."""
        return [optimizer.state_dict() for optimizer, _ in self._pairs]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Resumes from a checkpoint."""
        for (optimizer, _), known in zip(self._pairs, state, strict=True):
            optimizer.load_state_dict(known)


class Trainer(Protocol):
    """A network in training."""

    step: int

    def learn(self, batch: Any, share: float) -> float:
        """One step with a share of the learning rate; returns the value to log."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to resume."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes."""
        ...


def resume(trainer: Trainer, checkpoint: Path) -> None:
    """Resumes from a checkpoint, if there is one."""
    if checkpoint.exists():
        trainer.load_state_dict(torch.load(checkpoint, weights_only=True))


def keep(checkpoint: Path, state: Any) -> None:
    """Writes a checkpoint in place of the one before; of several processes, the first one does."""
    if rank():
        return
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(checkpoint, buffer.getvalue())


def run(trainer: Trainer, batches: Iterator[Any], steps: int, checkpoint: Path, label: str) -> None:
    """Trains up to so many steps in all; every hundred, logs the mean value and saves a checkpoint."""
    start, values = time.perf_counter(), []
    while trainer.step < steps:
        values.append(trainer.learn(next(batches), rate(trainer.step, steps)))
        if trainer.step % EVERY == 0 or trainer.step == steps:
            echo(f"{trainer.step} {label} {sum(values) / len(values):.4f} {time.perf_counter() - start:.0f} s")
            values = []
            keep(checkpoint, trainer.state_dict())


def rate(step: int, steps: int) -> float:
    """The share of the learning rate: it rises for fifty steps, stays, and falls from two fifths on, nearly to zero."""
    return share(step, step / steps)


def share(step: int, done: float) -> float:
    """The share of the learning rate, of a training of which so much is done, from 0 to 1."""
    falling = max(0.0, done - 0.4) / 0.6
    return min(1, (step + 1) / 50) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * falling)))
