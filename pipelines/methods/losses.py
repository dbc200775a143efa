"""Losses on attention maps."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_compose.attention.masks import bounds


def gaussian_over(region: Tensor) -> Tensor:
    """A Gaussian over the bounding box of a region, sigma half of its sides, highest value 1, and 0 outside the region.

    Args:
        region: True inside. Shape: [height, width].
    """
    weight = torch.zeros(region.shape, device=region.device)
    rows, columns = bounds(region)
    u = torch.linspace(-1, 1, rows.stop - rows.start, device=region.device)
    v = torch.linspace(-1, 1, columns.stop - columns.start, device=region.device)
    u, v = (x if len(x) > 1 else torch.zeros_like(x) for x in (u, v))
    weight[rows, columns] = torch.exp(-(u[:, None].square() + v[None, :].square()) / 2)
    weight = weight * region
    return weight / weight.max()


def concentration(maps: Tensor, weight: Tensor, best: int) -> Tensor:
    """1 minus the mean of the strongest attention inside a region (LoRA-Composer, L_ce).

    Args:
        maps: Attention to one token. Shape: [..., height, width].
        weight: Factor on the attention, 0 outside the region. Shape: [height, width].
        best: Number of cells in the mean.

    Returns:
        Shape: [...].
    """
    return (1 - (maps * weight).flatten(-2).topk(best, dim=-1).values.mean(dim=-1)).clamp(min=0)


def filling(maps: Tensor, region: Tensor) -> Tensor:
    """Distance of the attention profiles inside a region from the profiles of the region (LoRA-Composer, L_fill).

    A profile is the highest value of every column, or row; the deviation is averaged over the whole axis.

    Args:
        maps: Attention to one token. Shape: [..., height, width].
        region: 1 inside. Shape: [height, width].

    Returns:
        Sum over both axes. Shape: [...].
    """
    inside = maps * region
    columns = (inside.amax(dim=-2) - region.amax(dim=-2)).abs().mean(dim=-1)
    rows = (inside.amax(dim=-1) - region.amax(dim=-1)).abs().mean(dim=-1)
    return columns + rows


def outside_attention(attention: Tensor, inside: Tensor, outside: Tensor, best: int) -> Tensor:
    """The strongest attention that the cells of a region pay to cells outside (LoRA-Composer, L_region).

    Args:
        attention: Self-attention. Shape: [..., cells, cells seen].
        inside: Indices of the region's cells.
        outside: Indices of all others.
        best: Number of values in the mean.

    Returns:
        Shape: [...].
    """
    if not len(outside):
        return attention.new_zeros(attention.shape[:-2])
    outward = attention[..., inside, :][..., outside].flatten(-2)
    return outward.topk(min(best, outward.shape[-1]), dim=-1).values.mean(dim=-1)


def contrast(maps: Tensor, groups: Tensor, temperature: float) -> Tensor:
    """Contrastive loss (CLoRA; InfoNCE): low if maps are like those of their own group and unlike those of others.

    With s the cosine of two maps after subtracting each one's minimum, the mean over all ordered pairs (a, b) of a
    group of -log(e^(s_ab/t) / (e^(s_ab/t) + sum e^(s_an/t) over the maps n of all other groups)).

    Args:
        maps: Attention maps. Shape: [..., maps, height, width].
        groups: The group of every map; negative ones are left out. Shape: [..., maps].
        temperature: t.

    Returns:
        0 if no map has a partner, or there is only one group. Shape: [...].
    """
    flat = maps.flatten(-2)
    flat = flat - flat.amin(dim=-1, keepdim=True)
    length = flat.norm(dim=-1, keepdim=True)
    # A constant map has no direction and no gradient.
    unit = torch.where(length > 1e-8, flat / length.clamp(min=1e-8), 0)
    scores = unit @ unit.transpose(-1, -2) / temperature
    same = groups[..., :, None] == groups[..., None, :]
    there = (groups[..., :, None] >= 0) & (groups[..., None, :] >= 0)
    pairs = same & there & ~torch.eye(groups.shape[-1], dtype=torch.bool, device=groups.device)
    # Not -inf where there is no other group: its gradient would be NaN.
    against = scores.masked_fill(same | ~there, -1e4).logsumexp(dim=-1, keepdim=True)
    losses = torch.where(pairs, F.softplus(against - scores), 0)
    return losses.sum(dim=(-2, -1)) / pairs.sum(dim=(-2, -1)).clamp(min=1)
