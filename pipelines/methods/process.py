"""What a method is: settings that start a process, and a process that lives for one call."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, runtime_checkable

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


def alone(engine: Engine, chosen: Sequence[Sequence[int]]) -> Alone:
    """What a pass needs in which every prompt has one of its concepts, or none.

    Args:
        engine: Encodes the prompts.
        chosen: By prompt, the concept.
    """
    weights = engine.weights_of(chosen)
    conditioning = engine.encode(weights)
    return Alone(conditioning, constant_gates(engine, weights, conditioning))


def constant_gates(engine: Engine, weights: Tensor, conditioning: Conditioning) -> Gates:
    """Gates that are the same at all tokens and cells.

    Args:
        engine: Knows the rows of every prompt.
        weights: One number per concept. Shape: [prompts or 1, concepts].
        conditioning: The text of all rows.
    """
    gate = engine.by_row(weights, conditioning)
    return Gates(
        text=gate[:, None],
        image=dict.fromkeys(engine.levels, gate[:, None]),
        row=gate,
        latent_grid=engine.latent_grid,
    )


@lru_cache(maxsize=1024)
def say_once(message: str) -> None:
    """Logs a warning the first time it comes up in this process."""
    logger.warning(message)
