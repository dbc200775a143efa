"""The sizes of a call: pixels, latents, the grids of the model, images in the batch; and one step of its loop."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_compose.attention import Backbone, Grid


@dataclass(frozen=True)
class Canvas:
    """Sizes that all parts of a call share.

    Attributes:
        image_size: Height and width in pixels.
        latent_grid: Height and width of the latents.
        images_per_prompt: How many images each prompt gets.
        painted: For inpainting: 1 at latent cells that are repainted, on the CPU. Shape: [height, width]; None means
            all.
        any_noise: Whether other start noise would do as well: there is no image, and the caller gives no latents.
    """

    image_size: Grid
    latent_grid: Grid
    prompts: int
    images_per_prompt: int
    device: torch.device
    backbone: Backbone
    painted: Tensor | None = None
    any_noise: bool = False

    @property
    def images(self) -> int:
        """Images in the batch."""
        return self.prompts * self.images_per_prompt

    @property
    def pixels(self) -> int:
        """Pixels per latent cell and side."""
        return self.image_size[0] // self.latent_grid[0]

    @property
    def levels(self) -> frozenset[int]:
        """Levels on which the model has layers."""
        return self.backbone.levels

    @property
    def map_level(self) -> int:
        """The level whose attention maps show where concepts are."""
        return self.backbone.map_level

    def on(self, device: torch.device) -> "Canvas":
        """The canvas on another device."""
        return replace(self, device=device)

    def of_prompts(self, prompts: int) -> "Canvas":
        """The canvas of another number of prompts."""
        return replace(self, prompts=prompts)


@dataclass(frozen=True, eq=False)
class Step:
    """One pass of the denoising loop.

    Attributes:
        index: Number of the pass, from 0.
        count: Number of passes.
        cfg_scale: Classifier-free guidance of the call at this point; 1 or less is none.
        second_order: Whether the scheduler returns to the latents of the previous pass, as in Heun's second pass.
            Updates of the latents before such a pass would be lost.
        unguided: Whether this step has no guidance, whatever the scale.
    """

    index: int
    count: int
    t: Tensor
    cfg_scale: float = 1.0
    second_order: bool = False
    unguided: bool = False

    def within(self, part: float) -> bool:
        """Whether the step belongs to a part of all steps, from the first: a share of them, or above 1 a number."""
        return self.index < math.ceil(steps_in(part, self.count))

    @property
    def guided(self) -> bool:
        """Whether there are unconditional rows."""
        return self.cfg_scale > 1 and not self.unguided


def steps_in(part: float, count: int) -> float:
    """A fraction of all steps as a number of steps; a value above 1 is already one.

    Rounded, so that 0.28 of 25 steps are 7.
    """
    return round(part * count, 6) if part <= 1 else part


def images_of(prompts: Sequence[int], images_per_prompt: int) -> list[int]:
    """The images of some prompts, in the order of the batch."""
    return [prompt * images_per_prompt + image for prompt in prompts for image in range(images_per_prompt)]
