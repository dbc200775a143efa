"""Boxes and free masks on grids of latent cells: pure tensor functions."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_compose.attention.sites import Grid

Box = tuple[int, int, int, int]
"""left, top, right, bottom in pixels of the output image; right and bottom are outside."""


def box_mask(box: Box, image_size: Grid, grid: Grid) -> Tensor:
    """How much of every grid cell a box covers.

    The best covered cell has the value 1, so a box that is smaller than a cell does not vanish on a coarse grid.

    Args:
        box: The box in pixels.
        image_size: Height and width of the image in pixels.
        grid: Height and width of the result.

    Returns:
        Values in 0..1. Shape: [grid height, grid width], fp32.
    """
    left, top, right, bottom = box
    rows = _covered(top, bottom, image_size[0], grid[0])
    columns = _covered(left, right, image_size[1], grid[1])
    mask = rows[:, None] * columns[None, :]
    return mask / mask.max()


def _covered(start: int, stop: int, pixels: int, cells: int) -> Tensor:
    """Share of each of `cells` equal cells of a line of `pixels` that lies between start and stop."""
    edges = torch.linspace(0, pixels, cells + 1)
    overlap = edges[1:].clamp(max=float(stop)) - edges[:-1].clamp(min=float(start))
    return overlap.clamp(min=0) * (cells / pixels)


def resize_mask(mask: Tensor, grid: Grid) -> Tensor:
    """A free mask on a grid: the mean over every cell, scaled so that a non-empty mask reaches 1 somewhere.

    Values are in 0..1. Shape: [height, width]; `grid` is height and width of the result.
    """
    small = F.adaptive_avg_pool2d(mask.float()[None, None], grid)[0, 0]
    return small / small.max().clamp(min=torch.finfo(small.dtype).tiny)


def coarse_mask(mask: Tensor, level: int) -> Tensor:
    """A mask of the latent grid after `level` halvings, rounded up: the mean over the cells that become one.

    Values are in 0..1, scaled so that a non-empty mask reaches 1 somewhere. Shape: [height, width].
    """
    coarse = mask[None, None]
    if level:
        coarse = F.avg_pool2d(coarse, 2**level, ceil_mode=True, count_include_pad=False)
    return coarse[0, 0] / coarse.max().clamp(min=torch.finfo(mask.dtype).tiny)


def cells_of(mask: Tensor, threshold: float) -> Tensor:
    """The cells of a region: those of which it covers at least a share. The best covered cell always belongs to it.

    `mask` is from `box_mask` or `resize_mask`: values in 0..1 with maximum 1. With a `threshold` of 1 only cells count
    that lie inside completely. Shape: as the mask, bool.
    """
    return (mask >= threshold - 1e-4) & (mask > 0)


def bounds(region: Tensor) -> tuple[slice, slice]:
    """The rows and columns of a region's bounding box. Shape: [height, width], bool."""
    rows, columns = region.any(dim=1).nonzero()[:, 0], region.any(dim=0).nonzero()[:, 0]
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def thresholded(maps: Tensor, threshold: float) -> Tensor:
    """The cells of a map whose value is above a share of its maximum, which is below 1.

    Maps are not negative. The highest cell is always included, unless the map is 0 everywhere. Shape: [..., height,
    width], bool.
    """
    return maps > threshold * maps.amax(dim=(-2, -1), keepdim=True)


def dilated(mask: Tensor) -> Tensor:
    """A mask and all neighbours of its cells. Shape: [..., height, width], bool."""
    flat = mask.reshape(-1, 1, *mask.shape[-2:]).float()
    return (F.max_pool2d(flat, 3, stride=1, padding=1) > 0).view(mask.shape)


def eroded(mask: Tensor) -> Tensor:
    """The cells of a mask whose neighbours are all inside it; positions beyond the border are ignored."""
    return ~dilated(~mask)


def opened(mask: Tensor) -> Tensor:
    """A mask without parts thinner than three cells (morphological opening)."""
    return dilated(eroded(mask))


def closed(mask: Tensor) -> Tensor:
    """A mask with holes and gaps thinner than three cells filled (morphological closing)."""
    return eroded(dilated(mask))


def smooth(maps: Tensor) -> Tensor:
    """Smooths maps with a separable kernel of 3 x 3, mirrored at the borders. Shape: [..., height, width].

    exp(-(x / (2 * 0.5))^2) at -1, 0, 1, normalised (0.2119, 0.5761, 0.2119): the kernel of Attend-and-Excite's code,
    which the authors of LoRA-Composer use; a Gaussian of that sigma would be narrower.
    """
    line = torch.arange(-1, 2, device=maps.device, dtype=maps.dtype).square().neg().exp()
    line = line / line.sum()
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    for pad, kernel in (((1, 1, 0, 0), line[None]), ((0, 0, 1, 1), line[:, None])):
        cells = flat.shape[-1] if pad[0] else flat.shape[-2]
        padded = F.pad(flat, pad, mode="reflect" if cells > 1 else "replicate")
        flat = F.conv2d(padded, kernel[None, None])
    return flat.view(maps.shape)
