"""Divides a canvas between subjects: by the attention maps of a draft, around the regions that are given."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_compose.attention.masks import smooth
from lora_compose.pipelines.scene.scene import Concept

LENGTH, LENGTH_JOINT = 0.12, 0.16
"""The part of the steps that `draft` drafts, at least one step; the second where text and image are one sequence."""
APART_JOINT = 0.5
"""The part of the steps, from the first, in which `draft` isolates regions, and draws them to their words, where text
and image are one sequence."""
THRESHOLD = 0.3
"""The share of a map's maximum from which a cell counts for the centre of a subject."""


def divided(
    maps: Tensor,
    subjects: Sequence[Concept],
    regions: Sequence[Tensor],
    divide: Callable[[Tensor, Tensor], Tensor],
    threshold: float,
    painted: Tensor | None = None,
    leftover: float = 0.0,
) -> Tensor:
    """Divides the canvas of one image between its subjects.

    Args:
        maps: Attention to each subject. Shape: [subjects, map grid height, width].
        regions: The region of each subject on the latent grid; empty where none is given. Shape: [height, width] each.
        divide: Divides the free cells, given centres and 1 where a cell is free.
        threshold: As for `centres_of`.
        painted: 1 in the cells that may be divided (inpainting); None is all of them. Shape: [height, width].
        leftover: Cells in which the map of their subject is below this share of its maximum belong to no region.

    Returns:
        1 in the region of a subject; a cell is in one of them, or in several given ones. Shape: [subjects, height,
        width], fp32.

    Raises:
        ValueError: If the given regions leave no cell to the others.
    """
    masks, free = torch.stack(list(regions)).float(), _free(regions, painted)
    wanted = _wanted(regions)
    if not wanted:
        return masks
    if (cells := int(free.sum())) < len(wanted):
        names = ", ".join(subjects[n].name for n in wanted)
        raise ValueError(
            f"the given regions and the mask leave {cells} cells of the latents for {names}, which need one each; "
            "give smaller regions, a larger image, or fewer concepts"
        )
    smoothed, centres = _found(maps, subjects, wanted, free, threshold)
    masks[wanted] = _seated(divide(centres, free), centres, free)
    if leftover:
        masks[wanted] = _without_leftover(masks[wanted], smoothed, leftover)
    return masks


def spacing(
    maps: Tensor,
    subjects: Sequence[Concept],
    regions: Sequence[Tensor],
    threshold: float,
    painted: Tensor | None = None,
) -> float:
    """The distance of the two nearest centres, in sides of an equal part of the canvas; inf for fewer than two.

    Args and shapes: as for `divided`.
    """
    wanted = _wanted(regions)
    if len(wanted) < 2:
        return math.inf
    free = _free(regions, painted)
    centres = _found(maps, subjects, wanted, free, threshold)[1] * torch.tensor(free.shape)
    return float(torch.pdist(centres).min()) / math.sqrt(free.numel() / len(subjects))


def _wanted(regions: Sequence[Tensor]) -> list[int]:
    """The subjects without a given region."""
    return [n for n, region in enumerate(regions) if not region.any()]


def _free(regions: Sequence[Tensor], painted: Tensor | None) -> Tensor:
    """1 in the cells that may be divided. Shape: [height, width]."""
    return (1 - torch.stack(list(regions)).float().amax(dim=0)) * (1 if painted is None else painted)


def _found(
    maps: Tensor, subjects: Sequence[Concept], wanted: Sequence[int], free: Tensor, threshold: float
) -> tuple[Tensor, Tensor]:
    """The maps of wanted subjects, smooth and 0 where nothing is free, and their centres."""
    here = F.adaptive_avg_pool2d(free[None], (maps.shape[1], maps.shape[2]))[0]
    smoothed = smooth(maps[wanted]) * here
    return smoothed, centres_of(smoothed, [subjects[n].head_noun for n in wanted], threshold)


def _without_leftover(masks: Tensor, maps: Tensor, least: float) -> Tensor:
    """Masks without the cells in which the map of their subject is low; a subject that would have none keeps all."""
    fine = F.interpolate(maps[None], masks.shape[1:], mode="bilinear")[0]
    high = fine > least * fine.amax(dim=(1, 2), keepdim=True)  # whose maximum is below that of the coarse map
    kept = masks * high
    return torch.where(kept.any(dim=2).any(dim=1)[:, None, None], kept, masks)


def _seated(masks: Tensor, centres: Tensor, free: Tensor) -> Tensor:
    """A division in which every subject has a cell: one without takes the nearest of those that have several.

    A subject has none where many share a small canvas, or two have the same centre. Args and shape: as `strips`.
    """
    sides, cells = torch.tensor(free.shape), _cell_centres(free.shape)
    for n in (~masks.flatten(1).any(dim=1)).nonzero()[:, 0].tolist():
        several = masks.sum(dim=(1, 2), keepdim=True) > 1
        away = (cells - centres[n] * sides).square().sum(dim=-1)
        taken = int(torch.where((masks * several).any(dim=0), away, torch.inf).argmin())
        row, column = divmod(taken, masks.shape[2])
        masks[:, row, column] = 0
        masks[n, row, column] = 1
    return masks


def _cell_centres(grid: Sequence[int]) -> Tensor:
    """The centre of each cell, in cells. Shape: [height, width, 2]."""
    return torch.stack(torch.meshgrid(*(torch.arange(side) + 0.5 for side in grid), indexing="ij"), dim=-1)


def centres_of(maps: Tensor, classes: Sequence[str], threshold: float) -> Tensor:
    """The centre of each subject, in parts of the canvas (down, across). Shape: [subjects, 2].

    A subject's cells are those whose attention to it is above a share of its maximum, and higher than to any other
    subject, each relative to its maximum. Subjects of one class share the cells of all of them: clusters, from left to
    right in the order of the prompt.

    Args:
        maps: Attention to each subject. Shape: [subjects, height, width].
        classes: Class words of the subjects.
        threshold: The share of the maximum.
    """
    height, width = maps.shape[1:]
    heights = maps / maps.amax(dim=(1, 2), keepdim=True).clamp(min=1e-20)
    down, across = torch.meshgrid(
        (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij"
    )
    cells = torch.stack([down, across], dim=-1)
    centres = torch.zeros(len(maps), 2)
    words = list(dict.fromkeys(classes))
    of_class = torch.stack([heights[[n for n, c in enumerate(classes) if c == word]].amax(dim=0) for word in words])
    owner = of_class.argmax(dim=0)
    for k, word in enumerate(words):
        owned = (owner == k) & (of_class[k] > threshold)
        if not owned.any():
            owned = of_class[k] == of_class[k].max()
        members = [n for n, c in enumerate(classes) if c == word]
        centres[members] = clusters(cells[owned], of_class[k][owned], len(members))
    return centres


def clusters(points: Tensor, weights: Tensor, count: int) -> Tensor:
    """The centres of clusters of weighted points by k-means, from left to right. Shape: [count, 2].

    The first centre is the heaviest point, each further one the point with the largest weight times squared distance.
    """
    centres = points[weights.argmax()][None]
    while len(centres) < count:
        away = torch.cdist(points, centres).amin(dim=1).square() * weights
        centres = torch.cat([centres, points[away.argmax()][None]])
    for _ in range(10):
        shares = F.one_hot(torch.cdist(points, centres).argmin(dim=1), count) * weights[:, None]
        total = shares.sum(dim=0)
        moved = shares.T @ points / total[:, None].clamp(min=1e-20)
        centres = torch.where(total[:, None] > 0, moved, centres)
    return centres[centres[:, 1].argsort(stable=True)]


def strips(centres: Tensor, free: Tensor, *, block: int = 1, side: int = 0) -> Tensor:
    """Columns or rows of free cells, one for each subject, with borders half-way between their centres.

    Along the side on which the subjects are further apart. No strip is narrower than 0.7 of an equal part of the box
    around the free cells.

    Args:
        centres: In parts of the canvas (down, across). Shape: [subjects, 2].
        free: 1 where a cell may be used. Shape: [height, width].
        block: Borders lie on multiples of so many cells, if every subject gets a block.
        side: How wide a strip is at least, in cells, if there is room for it.

    Returns:
        Shape: [subjects, height, width].
    """
    rows, columns = (_extent(free.any(dim=axis)) for axis in (1, 0))
    box = free[rows, columns]
    start, inside = torch.tensor([rows.start, columns.start]), torch.tensor(box.shape)
    masks = torch.zeros(len(centres), *free.shape)
    masks[:, rows, columns] = _strips((centres * torch.tensor(free.shape) - start) / inside, box, block, side)
    return masks * free


def _extent(used: Tensor) -> slice:
    """The slice from the first to the last row or column that is used."""
    indices = used.nonzero()[:, 0]
    return slice(int(indices[0]), int(indices[-1]) + 1)


def _strips(centres: Tensor, free: Tensor, block: int, side: int) -> Tensor:
    """Strips of a whole box; centres in parts of it, which may lie outside. Shape: [subjects, height, width]."""
    count, sides = len(centres), torch.tensor(free.shape)
    spread = (centres.amax(dim=0) - centres.amin(dim=0)) * sides
    axis = 1 if spread[1] >= 0.8 * spread[0] else 0
    length = free.shape[axis]
    block = block if length // count >= block else 1
    least = min(math.ceil(max(0.7 * length / count, side) / block) * block, length // count // block * block)
    order = centres[:, axis].argsort(stable=True).tolist()
    borders = [0]
    for j, (before, after) in enumerate(pairwise(order), start=1):
        middle = float(centres[before, axis] + centres[after, axis]) / 2 * length
        latest = (length - least * (count - j)) // block * block
        borders.append(min(max(round(middle / block) * block, borders[-1] + least), latest))
    masks = torch.zeros(count, *free.shape)
    for n, (start, stop) in zip(order, pairwise([*borders, length]), strict=True):
        masks[n].narrow(axis, start, stop - start).fill_(1)
    return masks


def nearest(centres: Tensor, free: Tensor) -> Tensor:
    """Every free cell for the subject whose centre is nearest. Args and shape: as for `strips`."""
    cells, sides = _cell_centres(free.shape).flatten(0, 1), torch.tensor(free.shape)
    owner = torch.cdist(cells, centres * sides).argmin(dim=1).unflatten(0, free.shape)
    return F.one_hot(owner, len(centres)).movedim(-1, 0) * free
