"""Group normalisation by region, written out."""

from typing import Any

import torch
from torch import Tensor, nn


def region_normalised(x: Tensor, shares: Tensor, groups: int, eps: float) -> Tensor:
    """From sums of values and of their squares, in double precision; shares: [images, regions, cells]."""
    rows, channels, *grid = x.shape
    values = x.double().reshape(rows, groups, channels // groups, -1)
    own = shares.double().repeat(rows // len(shares), 1, 1)
    total = own.sum(dim=2)[:, None].clamp(min=1e-12) * values.shape[2]
    mean = torch.einsum("rgmc,rkc->rgk", values, own) / total
    square = torch.einsum("rgmc,rkc->rgk", values**2, own) / total
    deviation = ((square - mean**2).clamp(min=0) + eps).sqrt()
    at_cell = torch.einsum("rgk,rkc->rgc", mean, own), torch.einsum("rgk,rkc->rgc", 1 / deviation, own)
    out = (values - at_cell[0][:, :, None]) * at_cell[1][:, :, None]
    return out.reshape(rows, channels, *grid).float()


def shares_by_hand(masks: Tensor) -> Tensor:
    """The mean of each mask over a square around each cell, a tenth of the grid to each side; the rest is a region.

    Args:
        masks: Shape: [images, masks, height, width].

    Returns:
        Shape: [images, regions, cells].
    """
    height, width = masks.shape[2:]
    reach = max(1, round(0.2 * min(height, width))) // 2
    near = torch.arange(-reach, reach + 1)
    rows = (torch.arange(height)[:, None] + near).clamp(0, height - 1)
    columns = (torch.arange(width)[:, None] + near).clamp(0, width - 1)
    means = masks[:, :, rows].mean(dim=3)[..., columns].mean(dim=-1)
    every = torch.cat([means, (1 - means.sum(dim=1, keepdim=True)).clamp(min=0)], dim=1)
    return (every / every.sum(dim=1, keepdim=True)).flatten(2)


class RegionNormHook:
    """A forward hook that replaces the output of group normalisations in the first passes of a model.

    Args:
        masks: By grid. Shape: [images, masks, height, width].
        passes: How many passes of the whole model have it.
    """

    def __init__(self, model: nn.Module, masks: dict[tuple[int, int], Tensor], passes: int) -> None:
        self._shares = {grid: shares_by_hand(mask) for grid, mask in masks.items()}
        self._left = passes
        model.register_forward_hook(self._count)
        for module in model.modules():
            if isinstance(module, nn.GroupNorm):
                module.register_forward_hook(self)

    def _count(self, *_: Any) -> None:
        self._left -= 1

    def __call__(self, module: Any, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        if self._left <= 0:
            return out
        (x,) = inputs
        by_region = region_normalised(x, self._shares[x.shape[2], x.shape[3]], module.num_groups, module.eps)
        return nn.functional.group_norm(by_region, module.num_groups, module.weight, module.bias, module.eps)
