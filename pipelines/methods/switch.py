"""LoRA Switch, from Multi-LoRA Composition for Image Generation (arXiv 2402.16843).

One LoRA at a time, in the order of the concepts and round again. In step t = 1, 2, ... every adapted layer is

    W + w_i s_i B_i A_i        i = floor(((t - 1) mod (k tau)) / tau) + 1

for k concepts and the interval tau. One UNet pass per step whatever the number of concepts. Where prompts of one call
have different concepts, every prompt has its own turns. Styles have no turn: they act in all of them.

`docs/methods/switch.md` says what differs from the authors' code and why.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lora_compose.pipelines.engine import Engine
from lora_compose.pipelines.methods.process import Alone, alone, say_once, say_unread_by_passes


@dataclass(frozen=True)
class Switch:
    """One LoRA at a time, the next one every few steps.

    Attributes:
        interval: For how many steps a LoRA acts before the next one takes over; the paper's tau.
    """

    interval: int = 5

    def __post_init__(self) -> None:
        if type(self.interval) is not int or self.interval < 1:
            raise ValueError(f"interval must be a whole number of steps, at least 1, not {self.interval!r}")

    def start(self, engine: Engine) -> "Turns":
        """What every LoRA needs when its turn comes, if there are so many steps; text encoders take part."""
        if any(concept.region for concept in engine.concepts):
            say_once("switch has no use for regions; method='regional' has")
        say_unread_by_passes(engine)
        subjects = engine.subjects_of
        turns = math.lcm(*(max(1, len(mine)) for mine in subjects))
        needed = max(1, math.ceil(len(engine.timesteps) / self.interval))
        chosen = [[mine[turn % len(mine) :][:1] if mine else () for mine in subjects] for turn in range(turns)]
        return Turns(engine, [alone(engine, each) for each in chosen[:needed]], self.interval)


@dataclass(frozen=True)
class Turns:
    """The process of `Switch`.

    Attributes:
        engine: Runs the UNet.
        alone: What the pass of each turn needs.
        interval: Steps per turn.
    """

    engine: Engine
    alone: Sequence[Alone]
    interval: int

    def prepare(self, latents: Tensor) -> Tensor:
        """Nothing is to be prepared."""
        return latents

    def step(self, latents: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """One pass with guidance, with the LoRA whose turn it is."""
        turn = self.alone[self.engine.step // self.interval % len(self.alone)]
        return latents, self.engine.guide(self.engine.unet(latents, t, turn.conditioning, turn.gates))
