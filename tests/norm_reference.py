"""Group normalisation by region, written out cell by cell."""

from itertools import product
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn


def region_normalised(x: Tensor, shares: Tensor, groups: int, eps: float) -> Tensor:
    """Cell by cell, in double precision. Shape of the shares: [images, regions, cells]."""
    rows, channels, height, width = x.shape
    by_cell = x.double().reshape(rows, groups, channels // groups, height * width)
    out = torch.empty_like(by_cell)
    for row, group in product(range(rows), range(groups)):
        own = shares[row % len(shares)].double()
        values, means, deviations = by_cell[row, group], [], []
        for share in own:
            total = max(share.sum().item() * len(values), 1e-12)
            mean = (values * share).sum() / total
            means.append(mean)
            deviations.append(((values**2 * share).sum() / total - mean**2 + eps).sqrt())
        for cell in range(values.shape[1]):
            mean = sum(part * one for part, one in zip(own[:, cell], means, strict=True))
            scale = sum(part / one for part, one in zip(own[:, cell], deviations, strict=True))
            out[row, group, :, cell] = (values[:, cell] - mean) * scale
    return out.reshape(x.shape).float()


def shares_by_hand(masks: Tensor) -> Tensor:
    """The mean of each mask over a square around each cell, a tenth of the grid to each side; the rest is a region.

    Args:
        masks: Shape: [images, masks, height, width].

    Returns:
        Shape: [images, regions, cells].
    """
    images, count, height, width = masks.shape
    reach = max(1, round(0.2 * min(height, width))) // 2
    found = torch.zeros(images, count + 1, height, width)
    for image, y, x in product(range(images), range(height), range(width)):
        around = [
            (min(max(y + dy, 0), height - 1), min(max(x + dx, 0), width - 1))
            for dy in range(-reach, reach + 1)
            for dx in range(-reach, reach + 1)
        ]
        means = [fmean(masks[image, mask, *cell].item() for cell in around) for mask in range(count)]
        means.append(max(0.0, 1 - sum(means)))
        found[image, :, y, x] = torch.tensor(means) / sum(means)
    return found.flatten(2)


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
