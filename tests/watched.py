"""Methods whose processes can be looked at: `method = Watched(Clora())`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lora_compose.pipelines.denoising.process import Needs, Settings
from lora_compose.pipelines.denoising.session import Session
from lora_compose.pipelines.scene.canvas import Step

Look = Callable[[Any, Tensor, Step], None]
"""Looks at a process before a step: the process, the latents and the step."""


@dataclass
class Watched(Settings):
    """A method under observation.

    Attributes:
        settings: The method.
        look: Called before every step.
        processes: What it has started.
        prepared: The latents before and after every preparation.
        moves: What every step did to the latents before the scheduler.
    """

    settings: Settings
    look: Look | None = None
    processes: list[Any] = field(default_factory=list)
    prepared: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    moves: list[Tensor] = field(default_factory=list)

    @property
    def needs(self) -> Needs:
        """Those of the method."""
        return self.settings.needs

    def start(self, session: Session) -> "_Watching":
        """Starts the method."""
        self.processes.append(self.settings.start(session))
        return _Watching(self, self.processes[-1])

    @property
    def process(self) -> Any:
        """The only process."""
        (process,) = self.processes
        return process


@dataclass
class _Watching:
    watched: Watched
    process: Any

    @property
    def text(self) -> Any:
        return self.process.text

    def prepare(self, latents: Tensor, first: Step) -> Tensor:
        moved = self.process.prepare(latents, first)
        self.watched.prepared.append((latents, moved))
        return moved

    def step(self, latents: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        if self.watched.look is not None:
            self.watched.look(self.process, latents, step)
        moved, output = self.process.step(latents, step)
        self.watched.moves.append(moved - latents)
        return moved, output


def once(look: Look) -> Look:
    """Looks before the first step alone."""

    def first(process: Any, latents: Tensor, step: Step) -> None:
        if step.index == 0:
            look(process, latents, step)

    return first
