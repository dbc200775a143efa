"""What is to act where in a model: concepts, and the gates that a method makes of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from uuid import uuid4

import torch
from torch import Tensor

from lora_compose.attention import Gates, Grid, Lora, Site, grid_at
from lora_compose.attention.masks import Box, box_mask, resize_mask

UNIT = 1000
"""Boxes are in thousandths of the image, whose size is not known before it is sampled."""
Region = Box | Tensor
"""A box, or a mask with values in 0..1. Shape: [height, width]."""


@dataclass(frozen=True, eq=False)
class Composition:
    """Concepts that act together.

    Attributes:
        loras: Factors of each concept by ComfyUI's names of layers.
        weights: One for each concept.
        regions: Where each acts on the image; None is everywhere.
        words: On which tokens of the text each acts. Shape: [tokens, concepts]; 1 token stands for all.
        text_of_others: Whether concepts also act on the text of other conditionings, e.g. the negative one.
        image_of_others: Whether they also act on the image where other conditionings are predicted.
        mark: Stands for this composition in conditionings.
    """

    loras: Sequence[Lora]
    weights: Tensor
    regions: Sequence[Region | None]
    words: Tensor
    text_of_others: bool
    image_of_others: bool
    mark: str = field(init=False, default_factory=lambda: uuid4().hex)

    def gates(self, sites: Mapping[str, Site], ours: Sequence[bool], grid: Grid, tokens: int) -> Gates:
        """The gates of one pass.

        Args:
            sites: The layers of the model.
            ours: By row, whether it is predicted for our conditioning.
            grid: Height and width of the latents.
            tokens: Tokens of the text in each row; ComfyUI repeats shorter texts to the length of others.
        """
        words = self.words if any(ours) else self.words[:1]  # a pass of others has a text of any length
        mine = torch.tensor(ours, dtype=torch.float32)[:, None]
        image = torch.ones_like(mine) if self.image_of_others else mine
        text = torch.ones_like(mine) if self.text_of_others else mine
        everywhere = torch.tensor([float(region is None) for region in self.regions])
        levels = {site.level for site in sites.values() if "image" in site.parts}
        return Gates(
            text=text[:, None] * words.repeat(tokens // len(words), 1),
            image={level: image[:, None] * self._cells(grid_at(grid, level)) for level in levels},
            row=image * torch.ones(len(self.loras)),
            latent_grid=grid,
            # A transformer's modulation scales all cells alike, so a region would leak into the others.
            modulation=image * everywhere,
        ).times(self.weights)

    def _cells(self, grid: Grid) -> Tensor:
        """Where each concept acts. Shape: [cells, concepts], or [1, concepts] without regions."""
        if all(region is None for region in self.regions):
            return torch.ones(1, len(self.regions))
        return torch.stack([_cells(region, grid).flatten() for region in self.regions], dim=-1)


def _cells(region: Region | None, grid: Grid) -> Tensor:
    if region is None:
        return torch.ones(grid)
    return resize_mask(region, grid) if isinstance(region, Tensor) else box_mask(region, (UNIT, UNIT), grid)
