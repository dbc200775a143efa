"""Group normalisation by region: a LoRA changes the mean and variance of the cells of its own region alone.

Group normalisation, which every block of a UNet has, takes mean and variance over the whole canvas. So a LoRA that acts
in one region changes what all other cells are divided by, and the objects there fade or vanish. With s_r(x), the share
of cell x in region r (they add up to 1), and mean(x) and square(x), the means of the values and of their squares over
the channels of a group at a cell,

    mean_r = sum_x s_r(x) mean(x) / sum_x s_r(x)
    var_r  = sum_x s_r(x) square(x) / sum_x s_r(x) - mean_r^2
    y(x)   = (x - sum_r s_r(x) mean_r) sum_r s_r(x) / sqrt(var_r + eps)

Shares change gradually at borders, so that there is no seam. The layer then normalises y, which changes little, and
applies its weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_compose.attention.device import to_device
from lora_compose.attention.sites import Grid, grid_at

BORDER = 0.2
"""Width of the borders between regions, as a fraction of the shorter side of the grid."""
NORM_APART = 0.4
"""The part of the steps, from the first, in which normalisation is by region."""


@dataclass(frozen=True, eq=False)
class NormRegions:
    """The regions over which group normalisation takes its statistics.

    Attributes:
        shares: By grid, the share of each cell in each region; they add up to 1. Shape: [images, regions, cells].
        weights: By grid, the same divided by their sums over the cells.
    """

    shares: Mapping[Grid, Tensor]
    weights: Mapping[Grid, Tensor]

    @classmethod
    def of(cls, masks: Mapping[Grid, Tensor]) -> "NormRegions":
        """The regions of some masks, with borders, and a last one for all other cells.

        Args:
            masks: By grid; values in 0..1. Shape: [images, masks, height, width] each.
        """
        return cls.of_shares({grid: _shares(mask) for grid, mask in masks.items()})

    @classmethod
    def by_level(cls, shares: Mapping[int, Tensor], latent_grid: Grid, which: Sequence[int]) -> "NormRegions":
        """The regions of some concepts.

        Args:
            shares: How much of each cell is in the region of each concept, by level. Shape: [(images,) cells,
                concepts] each.
            latent_grid: Height and width of the latents.
            which: Indices of the concepts.
        """
        masks = {}
        for level, share in shares.items():
            grid = grid_at(latent_grid, level)
            masks[grid] = share[..., which].transpose(-1, -2).reshape(-1, len(which), *grid)
        return cls.of(masks)

    @classmethod
    def of_shares(cls, shares: Mapping[Grid, Tensor]) -> "NormRegions":
        """The regions of shares that add up to 1."""
        return cls(shares, {grid: share / share.sum(2, keepdim=True).clamp(min=1e-6) for grid, share in shares.items()})

    def to(self, device: torch.device) -> "NormRegions":
        """Shares and weights on a device."""
        shares, weights = (
            {grid: to_device(values, device) for grid, values in given.items()} for given in (self.shares, self.weights)
        )
        return NormRegions(shares, weights)

    def normalised(self, x: Tensor, groups: int, eps: float) -> Tensor:
        """Features with mean 0 and variance 1 in each group of channels and each region.

        Args:
            x: Of all images, once for each branch. Shape: [branches * images, channels, height, width].

        Raises:
            KeyError: If there are no regions for this grid.
        """
        grid = x.shape[2], x.shape[3]
        shares, weights = self.shares[grid], self.weights[grid]
        by_group = x.unflatten(1, (groups, -1)).unflatten(0, (-1, len(shares)))
        moments = _moments(by_group)
        # No matrix products: on a GPU they may be rounded to fewer bits.
        means, squares = (moments[..., None, :] * weights[:, None]).sum(-1)
        scales = (squares - means.square()).clamp(min=0).add(eps).rsqrt()
        mean, scale = (torch.stack([means, scales])[..., None] * shares[:, None]).sum(-2).unflatten(-1, grid)
        shift = -mean * scale
        return torch.addcmul(shift[:, :, :, None], by_group, scale[:, :, :, None]).reshape(x.shape).to(x.dtype)


def _moments(values: Tensor) -> Tensor:
    """Means of values and of their squares over the channels of a group. Shape: [2, ..., cells]."""
    values = values.float()
    return torch.stack([values.mean(3), values.square().mean(3)]).flatten(4)


def _shares(masks: Tensor) -> Tensor:
    """Masks with soft borders, and the rest as a last region. Shape: [images, regions, cells]."""
    side = max(1, round(BORDER * min(masks.shape[2:]))) // 2
    blurred = F.avg_pool2d(F.pad(masks.float(), (side,) * 4, mode="replicate"), 2 * side + 1, stride=1)
    others = (1 - blurred.sum(dim=1, keepdim=True)).clamp(min=0)
    shares = torch.cat([blurred, others], dim=1)
    return (shares / shares.sum(dim=1, keepdim=True)).flatten(2)
