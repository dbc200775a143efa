"""What a method is: settings that start a process, and a process that lives for one call."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from attention import Gates
from attention.layers import Kind
from pipelines.conditioning import Conditioning
from pipelines.engine import Engine

logger = logging.getLogger(__name__)


class Process(Protocol):
    """A method at work on one call. It installs nothing itself."""

    def prepare(self, latents: Tensor) -> Tensor:
        """Once, before the loop, with the concepts installed; returns the latents to start from."""
        ...

    def step(self, latents: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """One step; returns (latents, model output), which both go to the scheduler."""
        ...


@runtime_checkable
class Settings(Protocol):
    """A method with its settings: a frozen dataclass."""

    def start(self, engine: Engine) -> Process:
        """Checks what the method needs, encodes the prompts and returns the process for this call.

        Raises:
            ValueError: If the concepts lack something the method needs.
        """
        ...


@dataclass(frozen=True)
class OnePass:
    """The process of methods that need one UNet pass per step and the same gates throughout.

    Attributes:
        engine: Runs the UNet.
        conditioning: The text.
        gates: How strongly each concept acts where.
        constant: Kinds of layers whose gates are the same on all rows and positions, to be folded into the model.
        constant_weights: Those gates, one per concept.
    """

    engine: Engine
    conditioning: Conditioning
    gates: Gates
    constant: Sequence[Kind] = ()
    constant_weights: Sequence[float] = ()

    def prepare(self, latents: Tensor) -> Tensor:
        """Folds what is constant."""
        self.engine.fold(self.constant, self.constant_weights)
        return latents

    def step(self, latents: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """One pass with guidance."""
        return latents, self.engine.guide(self.engine.unet(latents, t, self.conditioning, self.gates))


@dataclass(frozen=True)
class Alone:
    """What a UNet pass needs in which one concept's LoRA acts at its weight, everywhere, and no other acts at all.

    Attributes:
        conditioning: The text, encoded with that LoRA's text-encoder factors.
        gates: The concept's weight at the concept, 0 at the others.
    """

    conditioning: Conditioning
    gates: Gates


def each_alone(engine: Engine) -> list[Alone]:
    """What passes with one LoRA each need, in the order of the concepts."""
    only = torch.diag(torch.tensor(engine.weights)).tolist()
    return [Alone(engine.encode(weights), constant_gates(engine, weights)) for weights in only]


def constant_gates(engine: Engine, weights: Sequence[float]) -> Gates:
    """Gates that are the same at all tokens, cells and rows: one number per concept."""
    gate = torch.tensor(weights, device=engine.device)
    return Gates(
        text=gate[None, None],
        image=dict.fromkeys(engine.levels, gate[None, None]),
        row=gate[None],
        latent_grid=engine.latent_grid,
    )


@lru_cache(maxsize=1024)
def say_once(message: str) -> None:
    """Logs a warning the first time it comes up in this process."""
    logger.warning(message)
