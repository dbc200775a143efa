"""Latent re-initialisation (LoRA-Composer, arXiv 2403.11627, section 3.5)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_compose.attention.masks import bounds


def reinitialised(latents: Tensor, scores: Tensor, regions: Sequence[Tensor], factor: int, *, swap: bool) -> Tensor:
    """Moves the most attended patch of noise into every region.

    For each image and region it is the patch where the region, moved over the canvas, covers the most attention.

    Args:
        latents: Shape: [images, channels, height, width].
        scores: Attention to each concept's words. Shape: [images, regions, grid height, grid width].
        regions: True inside. Shape: [grid height, grid width] each, on any device.
        factor: Latent cells per grid cell and side.
        swap: Exchanges the two patches, and does not move noise twice. Otherwise the noise is copied, and the latents
            are scaled back to their mean and standard deviation, as in the authors' code.

    Returns:
        Shape: as latents.
    """
    masks = [region.bool().cpu() for region in regions]
    return torch.stack([_image(*of_image, masks, factor, swap) for of_image in zip(latents, scores.cpu(), strict=True)])


def _image(latents: Tensor, scores: Tensor, regions: Sequence[Tensor], factor: int, swap: bool) -> Tensor:
    result = latents.clone(memory_format=torch.contiguous_format)
    taken = torch.zeros(scores.shape[1:], dtype=torch.bool)
    for score, region in zip(scores, regions, strict=True):
        place = _best_place(score, region, taken if swap else torch.zeros_like(taken))
        if place is None:
            continue
        source, target = _pairs(region, place, latents.shape[-2:], factor)
        if swap:
            taken |= region | place
            _exchange(result.flatten(1), source, target)
        else:
            result.flatten(1)[:, target] = latents.flatten(1)[:, source]
    if swap:
        return result
    return (result - result.mean()) / result.std() * latents.std() + latents.mean()


def _best_place(score: Tensor, region: Tensor, taken: Tensor) -> Tensor | None:
    """The region, moved to where it covers most of the score and nothing taken; None if there is no such place."""
    rows, columns = bounds(region)
    shape = region[rows, columns].float()[None, None]
    covered = F.conv2d(score[None, None], shape)[0, 0]
    covered[F.conv2d(taken.float()[None, None], shape)[0, 0] > 0] = -torch.inf
    if covered.max() == -torch.inf:
        return None
    top, left = divmod(int(covered.argmax()), covered.shape[1])
    return region.roll((top - rows.start, left - columns.start), dims=(0, 1))


def _pairs(region: Tensor, place: Tensor, shape: torch.Size, factor: int) -> tuple[Tensor, Tensor]:
    """Flat indices of latent cells in a place and of those in the region to which they go, in the same order."""
    inner = torch.arange(factor)

    def cells(mask: Tensor) -> Tensor:
        corners = mask.nonzero() * factor
        return (corners[:, None, None] + torch.stack(torch.meshgrid(inner, inner, indexing="ij"), dim=-1)).flatten(0, 2)

    source, target = cells(place), cells(region)
    fits = ((source < torch.tensor(shape)) & (target < torch.tensor(shape))).all(dim=1)  # odd grids are rounded up
    return tuple(side[fits] @ torch.tensor([shape[1], 1]) for side in (source, target))  # pyright: ignore[reportReturnType]


def _exchange(flat: Tensor, source: Tensor, target: Tensor) -> None:
    """Moves values from source to target, and those they displace to where they came from."""
    before = flat.clone()
    flat[:, target] = before[:, source]
    left = source[~torch.isin(source, target)]
    displaced = target[~torch.isin(target, source)]
    flat[:, left] = before[:, displaced]
