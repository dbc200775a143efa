"""Tasks: where the latents start, and what happens to them after a step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lora_compose.pipelines.canvas import Step


class Task(Protocol):
    """What an image starts from and has to keep."""

    def start(self) -> Tensor:
        """The latents before the first step. Shape: [images, channels, height, width]."""
        ...

    def after_step(self, latents: Tensor, step: Step) -> Tensor:
        """The latents after a scheduler step, for what has to be put back (inpainting)."""
        ...


@dataclass(frozen=True)
class TextToImage:
    """Starts from noise and keeps nothing.

    Attributes:
        noise: The start noise, scaled for the scheduler.
    """

    noise: Callable[[], Tensor]

    def start(self) -> Tensor:
        """The start noise."""
        return self.noise()

    def after_step(self, latents: Tensor, step: Step) -> Tensor:
        """The latents as they are."""
        return latents
