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


@lru_cache(maxsize=1024)
def say_once(message: str) -> None:
    """Logs a warning the first time it comes up in this process."""
    logger.warning(message)
