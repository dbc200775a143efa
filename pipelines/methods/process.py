"""What a method is: settings that start a process, and a process that lives for one call."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from attention import Gates, grid_at
from attention.layers import Kind
from attention.masks import box_mask
from pipelines.conditioning import Conditioning
from pipelines.engine import Engine


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
        constant: Kinds of layers whose gates are the concepts' weights everywhere, to be folded into the model.
        constant_weights: Those weights.
    """

    engine: Engine
    conditioning: Conditioning
    gates: Gates
    constant: Sequence[Kind]
    constant_weights: Sequence[float]

    def prepare(self, latents: Tensor) -> Tensor:
        """Folds what is constant."""
        self.engine.fold(self.constant, self.constant_weights)
        return latents

    def step(self, latents: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """One pass with guidance."""
        return latents, self.engine.guide(self.engine.unet(latents, t, self.conditioning, self.gates))


def image_gates(engine: Engine, weights: Tensor) -> dict[int, Tensor]:
    """Gates over image cells: each concept's weight inside its region, or everywhere if it has none.

    Args:
        engine: Its concepts and grid.
        weights: Shape: [concepts].

    Returns:
        By level: [1, 1, concepts] if no concept has a region, else [1, cells, concepts].
    """
    if all(concept.region is None for concept in engine.concepts):
        return dict.fromkeys(engine.levels, weights[None, None])
    return {level: (_region_masks(engine, level) * weights)[None] for level in engine.levels}


def _region_masks(engine: Engine, level: int) -> Tensor:
    grid = grid_at(engine.latent_grid, level)
    masks = [
        torch.ones(grid) if concept.region is None else box_mask(concept.region, engine.image_size, grid)
        for concept in engine.concepts
    ]
    return torch.stack(masks, dim=-1).flatten(0, 1).to(engine.device)
