"""Regions: from boxes or mask images (white = inside) to the cells of every grid."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lora_compose.attention.masks import bounds, box_mask, cells_of, coarse_mask, resize_mask
from lora_compose.attention.sites import Grid, coarser
from lora_compose.pipelines.scene.mask_images import URI_PREFIX, from_uri, greys, in_pixels, mask_name, open_image
from lora_compose.pipelines.scene.scene import BoxOrMask, Concept, check_box

HALF = 0.5
"""A cell reads the texts of regions that cover at least this share of it."""


def read_mask(path: str) -> Tensor:
    """Reads a mask image: its opacity if a pixel is transparent, else its brightness; white or opaque is inside.

    Args:
        path: A file, or a data URI (`as_uri`).

    Returns:
        Values in 0..1. Shape: [height, width], fp32.

    Raises:
        ValueError: If it is missing or unreadable, or nothing is inside.
    """
    values = greys(from_uri(path) if path.startswith(URI_PREFIX) else open_image(path, "mask"))
    mask = torch.from_numpy(np.asarray(values, dtype=np.float32) / 255)
    if not mask.any():
        raise ValueError(f"the mask {mask_name(path)} is black all over; it has to be white where the concept may be")
    return mask


def check_mask(path: str, width: int | None, height: int | None) -> None:
    """Raises ValueError if a mask cannot be used, or has other proportions than the canvas."""
    mask_height, mask_width = read_mask(path).shape
    if width is not None and height is not None and abs(mask_width * height / mask_height - width) > 1 + width / 100:
        raise ValueError(
            f"the mask {mask_name(path)} has {mask_width} x {mask_height} pixels, the canvas {width} x {height}: "
            "their proportions differ"
        )


def check_region(concept: Concept, width: int | None, height: int | None) -> None:
    """Raises ValueError if a concept's region does not fit the canvas; sizes that are None are not checked."""
    if isinstance(concept.region, str):
        check_mask(concept.region, width, height)
    check_box(concept, width, height)


def region_mask(region: BoxOrMask | Tensor | None, image_size: Grid, grid: Grid, *, sharp: bool = False) -> Tensor:
    """A region on a grid; 1 everywhere without a region.

    Args:
        region: A box, the path of a mask, or a mask that has been read.
        image_size: Height and width of the canvas in pixels.
        sharp: Whether each pixel of a mask is inside or outside, split at half of the maximum; otherwise greys count in
            part.

    Returns:
        Values in 0..1, of which one is 1. Shape: [grid height, grid width], fp32.
    """
    if region is None:
        return torch.ones(grid)
    if not isinstance(region, str | Tensor):
        return box_mask(in_pixels(region, *image_size[::-1]), image_size, grid)
    mask = read_mask(region) if isinstance(region, str) else region
    return resize_mask((mask >= mask.max() / 2).float() if sharp else mask, grid)


Window = tuple[slice, slice]
"""Rows and columns of the latents that are a part of the canvas."""

_MOST = 0.75
"""A window that covers this share of a side covers all of it, which often makes a pass of the whole canvas
unnecessary."""


@dataclass(frozen=True, eq=False)
class Regions:
    """The cells that lie in each region, on all grids of a canvas or of a part of it.

    Attributes:
        indices: Indices of the concepts that have the regions.
        cells: By level, the latents' own (0) among them. Shape: [height, width, regions], bool, on the CPU.
    """

    indices: tuple[int, ...]
    cells: Mapping[int, Tensor]

    @classmethod
    def of(
        cls,
        regions: Sequence[BoxOrMask | None],
        image_size: Grid,
        latent_grid: Grid,
        levels: Collection[int],
        threshold: float,
        painted: Tensor | None = None,
    ) -> "Regions":
        """The regions of all concepts that have one; masks are sharp here, so that grey pixels do not thin out cells.

        Args:
            regions: Regions of the concepts; None without one.
            image_size: Height and width of the canvas in pixels.
            latent_grid: Height and width of the latents.
            levels: Levels of the grids.
            threshold: A cell belongs to a region that covers at least this share of it.
            painted: 1 at painted cells; regions are cut to these. Shape: [height, width]; None means everywhere.
        """
        indices = tuple(i for i, region in enumerate(regions) if region is not None)
        masks = [region_mask(regions[i], image_size, latent_grid, sharp=True) for i in indices]
        if painted is not None:
            masks = [resize_mask(mask * painted, latent_grid) for mask in masks]
        return cls.of_masks(indices, masks, levels, threshold)

    @classmethod
    def of_masks(
        cls, indices: Sequence[int], masks: Iterable[Tensor], levels: Collection[int], threshold: float
    ) -> "Regions":
        """Regions from masks on the latent grid.

        Args:
            indices: Indices of the concepts that have the masks.
            masks: Values in 0..1. Shape: [height, width] each.
            levels: Levels of the grids.
            threshold: The share of a cell that a region covers, from which on the cell belongs to it.
        """
        masks = [mask.cpu() for mask in masks]
        cells = {
            level: torch.stack([cells_of(coarse_mask(mask, level), threshold) for mask in masks], dim=-1)
            for level in {0, *levels}
        }
        return cls(tuple(indices), cells)

    @property
    def grid(self) -> Grid:
        """Height and width of the latents."""
        height, width, _ = self.cells[0].shape
        return height, width

    def window(self, region: int, side: float) -> Window:
        """A part of the canvas around a region that can be halved as often as the whole.

        Args:
            side: Cells of the latents that each side has at least, if the canvas has them.
        """
        grain = 2 ** max(self.cells)

        def stretch(inside: slice, reached: slice, cells: int) -> slice:
            middle, half = (inside.start + inside.stop) / 2, max(side, inside.stop - inside.start) / 2
            start = max(0, math.floor((middle - half) / grain) * grain)
            stop = min(cells, math.ceil((middle + half) / grain) * grain)
            start = max(0, min(start, math.floor((stop - side) / grain) * grain))
            stop = min(cells, max(stop, math.ceil((start + side) / grain) * grain))
            start = min(start, math.floor(reached.start / grain) * grain)
            stop = max(stop, min(cells, math.ceil(reached.stop / grain) * grain))
            return slice(0, cells) if stop - start >= _MOST * cells else slice(start, stop)

        inside, reached = bounds(self.cells[0][..., region]), self._reached(region)
        rows, columns = map(stretch, inside, reached, self.grid)
        return rows, columns

    def _reached(self, region: int) -> Window:
        """The latent cells that a region covers on any grid; a coarse cell may reach beyond the region."""
        extents = [
            [(part.start * 2**level, part.stop * 2**level) for part in bounds(cells[..., region])]
            for level, cells in self.cells.items()
            if cells[..., region].any()
        ]
        rows, columns = (
            slice(min(start for start, _ in parts), min(length, max(stop for _, stop in parts)))
            for parts, length in zip(zip(*extents, strict=True), self.grid, strict=True)
        )
        return rows, columns

    def part(self, window: Window, region: int) -> "Regions":
        """One region, as it lies in a part of the canvas; the others are background there."""
        only = torch.arange(len(self.indices)) == region
        rows, columns = window
        cut = {level: cells[coarser(rows, level), coarser(columns, level)] for level, cells in self.cells.items()}
        return Regions(self.indices, {level: cells & only for level, cells in cut.items()})

    def shares(self, level: int, concepts: int) -> Tensor:
        """Each concept's share of each cell; overlapping regions share a cell equally. Shape: [cells, concepts]."""
        cells = self.cells[level].flatten(0, 1)
        shares = torch.zeros(len(cells), concepts)
        shares[:, list(self.indices)] = cells / cells.sum(dim=1, keepdim=True).clamp(min=1)
        return shares
