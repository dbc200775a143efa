"""Losses on attention maps have the values of their formulas.

Those of LoRA-Composer: arXiv 2403.11627, section 3.3. The contrastive loss of CLoRA: arXiv 2403.19776.
"""

import math
from collections.abc import Callable, Sequence
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_metric_learning.losses import NTXentLoss
from scipy.ndimage import convolve1d
from torch import Tensor

from components import seeded
from lora_compose.attention.masks import bounds, smooth
from lora_compose.pipelines.methods.losses import (
    concentration,
    contrast,
    filling,
    gaussian_over,
    outside_attention,
)

SMOOTHING = (0.2119, 0.5761, 0.2119)
"""The published kernel, rounded."""

Box = tuple[int, int, int, int]
"""top, left, bottom, right in cells."""

SCENE: Box = (1, 20, 23, 29)
"""22 rows and 9 columns of a grid of 24 x 32."""


def boxed(box: Box, grid: tuple[int, int] = (24, 32)) -> Tensor:
    region = torch.zeros(grid, dtype=torch.bool)
    region[box[0] : box[2], box[1] : box[3]] = True
    return region


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(*shape, generator=seeded(seed), dtype=dtype)


def test_a_point_is_smoothed_into_the_kernel() -> None:
    point = torch.zeros(7, 9)
    point[3, 4] = 1
    found = smooth(point)
    line = torch.tensor(SMOOTHING)
    torch.testing.assert_close(found[2:5, 3:6], line[:, None] * line[None, :], atol=1e-4, rtol=0)
    torch.testing.assert_close(found[2:5, 3:6].sum(), torch.tensor(1.0))
    assert int((found != 0).sum()) == 9
    assert sum(SMOOTHING) == pytest.approx(1, abs=2e-4)


@given(st.integers(2, 9), st.integers(2, 9), st.integers(0, 2**16))
def test_smoothing_equals_scipy_with_mirrored_borders(height: int, width: int, seed: int) -> None:
    maps = random(2, 3, height, width, seed=seed)
    weights = np.exp(-(np.array([-1.0, 0.0, 1.0]) ** 2))
    weights /= weights.sum()
    expected = maps.double().numpy()
    for axis in (-2, -1):
        expected = convolve1d(expected, weights, axis=axis, mode="mirror")
    torch.testing.assert_close(smooth(maps).double(), torch.from_numpy(expected), atol=1e-6, rtol=0)


def test_bells_fall_from_one_in_the_middle_to_e_to_the_minus_one_in_the_corners() -> None:
    weight = gaussian_over(boxed((2, 3, 9, 8), (12, 10)))
    assert weight.max() == 1
    assert weight[5, 5] == 1
    for row, column in ((2, 3), (2, 7), (8, 3), (8, 7)):
        assert weight[row, column].item() == pytest.approx(math.exp(-1), abs=1e-6)
    assert weight[2, 5].item() == pytest.approx(math.exp(-0.5), abs=1e-6)
    assert weight[5, 3].item() == pytest.approx(math.exp(-0.5), abs=1e-6)
    assert torch.equal(weight > 0, boxed((2, 3, 9, 8), (12, 10)))


def test_the_bell_of_a_tall_box_has_the_published_values() -> None:
    region = boxed(SCENE)
    weight = gaussian_over(region)
    best = int(0.2 * int(region.sum()))
    assert best == 39
    assert weight[1, 20].item() == pytest.approx(0.3683, abs=5e-5)
    assert weight.flatten().topk(best).values.mean().item() == pytest.approx(0.9296, abs=5e-5)
    assert concentration(torch.ones(24, 32), weight, best).item() == pytest.approx(1 - 0.9296, abs=5e-5)


def test_bells_of_free_regions_are_zero_in_the_gaps_and_reach_one() -> None:
    region = boxed((1, 1, 6, 6), (8, 8))
    region[2:5, 2:5] = False
    weight = gaussian_over(region)
    assert torch.equal(weight > 0, region)
    assert weight.max() == 1
    assert weight[1, 3] == 1
    assert weight[1, 1].item() == pytest.approx(math.exp(-0.5), abs=1e-6)


def test_bounds_enclose_all_parts_of_a_region() -> None:
    region = torch.zeros(7, 9, dtype=torch.bool)
    region[2, 3] = region[5, 1] = True
    assert bounds(region) == (slice(2, 6), slice(1, 4))
    assert bounds(torch.ones(3, 4, dtype=torch.bool)) == (slice(0, 3), slice(0, 4))


def test_filling_measures_the_profiles_over_the_whole_axes() -> None:
    region = boxed((1, 1, 3, 3), (4, 5)).float()
    maps = torch.zeros(4, 5)
    maps[1, 1], maps[2, 1] = 0.75, 0.5
    columns = (0.25 + 1) / 5  # 0.75 and nothing where 1 is wanted
    rows = (0.25 + 0.5) / 4
    torch.testing.assert_close(filling(maps, region), torch.tensor(columns + rows))


def test_concentration_is_the_distance_of_the_strongest_cells_from_one() -> None:
    maps = torch.tensor([[0.9, 0.1, 0.8], [0.2, 0.6, 0.7]])
    weight = torch.tensor([[1.0, 1.0, 0.5], [1.0, 1.0, 0.0]])
    torch.testing.assert_close(concentration(maps, weight, 2), torch.tensor(1 - (0.9 + 0.6) / 2))
    torch.testing.assert_close(concentration(maps, weight, 1), torch.tensor(1 - 0.9))
    assert concentration(maps * 3, weight, 2) == 0, "more than enough is enough"


@given(st.integers(2, 8), st.integers(1, 7), st.integers(1, 12), st.integers(0, 2**16))
def test_outside_attention_is_the_mean_of_the_strongest_looks_outside(
    cells: int, size: int, best: int, seed: int
) -> None:
    attention = random(2, cells, cells, seed=seed).softmax(dim=-1)
    order = torch.randperm(cells, generator=seeded(seed))
    inside, outside = order[: min(size, cells - 1)].sort().values, order[min(size, cells - 1) :].sort().values
    found = outside_attention(attention, inside, outside, best)
    assert found.shape == (2,)
    for image in range(2):
        looks = [attention[image, p, q].item() for p in inside.tolist() for q in outside.tolist()]
        strongest = sorted(looks, reverse=True)[:best]
        assert found[image].item() == pytest.approx(sum(strongest) / len(strongest), abs=1e-6)


def test_outside_attention_is_zero_only_where_no_cell_looks_outside() -> None:
    inside, outside = torch.tensor([0, 2]), torch.tensor([1, 3])
    attention = torch.zeros(2, 4, 4)
    attention[:, inside[:, None], inside] = 0.5
    attention[:, outside] = 0.25  # what the others look at does not count
    assert torch.equal(outside_attention(attention, inside, outside, 3), torch.zeros(2))
    attention[1, 2, 3] = 0.3
    torch.testing.assert_close(outside_attention(attention, inside, outside, 3), torch.tensor([0, 0.1]))


def test_a_region_of_the_whole_canvas_has_no_outside() -> None:
    attention = random(3, 4, 4)
    nothing = torch.tensor([], dtype=torch.long)
    assert torch.equal(outside_attention(attention, torch.arange(4), nothing, 2), torch.zeros(3))


def distinct(*shape: int, seed: int = 0) -> Tensor:
    """Values in 0..1 that are far enough apart for finite differences, in double precision."""
    order = torch.randperm(math.prod(shape), generator=seeded(seed))
    return ((order.double() + 0.5) / len(order)).view(shape).requires_grad_()


REGION = boxed((1, 1, 4, 5), (5, 7))
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "concentration": lambda maps: concentration(maps, gaussian_over(REGION).double(), 3),
    "concentration without a Gaussian": lambda maps: concentration(maps, REGION.double(), 3),
    "filling": lambda maps: filling(maps, REGION.double()),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_cross_attention_losses_equal_finite_differences(name: str) -> None:
    assert torch.autograd.gradcheck(LOSSES[name], distinct(2, 5, 7))


def test_the_gradient_of_outside_attention_equals_finite_differences() -> None:
    inside, outside = torch.tensor([0, 2, 3]), torch.tensor([1, 4])
    assert torch.autograd.gradcheck(
        lambda attention: outside_attention(attention, inside, outside, 3), distinct(2, 5, 5)
    )


def test_losses_of_images_and_tokens_are_independent() -> None:
    maps, attention = random(3, 2, 5, 7), random(3, 35, 35)
    inside, outside = REGION.flatten().nonzero()[:, 0], (~REGION).flatten().nonzero()[:, 0]
    for loss, seen in (
        (lambda a: concentration(smooth(a), gaussian_over(REGION), 3), maps),
        (lambda a: filling(smooth(a), REGION.float()), maps),
        (lambda a: outside_attention(a, inside, outside, 3), attention),
    ):
        torch.testing.assert_close(loss(seen), torch.stack([loss(image) for image in seen]))


# The contrastive loss


def exact(*shape: int, seed: int = 0) -> Tensor:
    return random(*shape, seed=seed, dtype=torch.float64)


LABELS = torch.tensor([0, 0, 1, 1])


def contrast_of(rows: Sequence[Sequence[float]], labels: list[int], temperature: float = 0.5) -> float:
    maps = torch.tensor(rows, dtype=torch.float64)[:, None]
    return contrast(maps, torch.tensor(labels), temperature).item()


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Maps on a small grid and their groups."""
    labels = draw(st.lists(st.integers(0, 3), min_size=2, max_size=8))
    shape = len(labels), draw(st.integers(1, 4)), draw(st.integers(2, 4))
    return exact(*shape, seed=draw(st.integers(0, 10**6))), torch.tensor(labels)


def test_groups_that_are_apart_and_groups_that_are_mixed_have_known_values() -> None:
    together = contrast_of([[1, 0], [1, 0], [0, 1], [0, 1]], [0, 0, 1, 1])
    mixed = contrast_of([[1, 0], [0, 1], [1, 0], [0, 1]], [0, 0, 1, 1])
    assert together == pytest.approx(math.log(1 + 2 * math.exp(-2)), abs=1e-6) == 0.23954476
    assert mixed == pytest.approx(math.log(2 + math.exp(2)), abs=1e-6)
    assert mixed == pytest.approx(2.23954, abs=1e-5)


@given(cases(), st.floats(0.1, 2))
def test_the_contrastive_loss_equals_an_independent_one(case: tuple[Tensor, Tensor], temperature: float) -> None:
    maps, labels = case
    lowest = maps.flatten(1) - maps.flatten(1).amin(dim=1, keepdim=True)
    expected = NTXentLoss(temperature)(lowest, labels)
    assert contrast(maps, labels, temperature).item() == pytest.approx(float(expected), abs=1e-5)


@given(cases(), st.floats(0.2, 5), st.floats(0, 3), st.randoms(use_true_random=False))
def test_scale_offset_and_order_do_not_change_the_contrastive_loss(
    case: tuple[Tensor, Tensor], scale: float, offset: float, chance: Random
) -> None:
    maps, labels = case
    expected = contrast(maps, labels, 0.5)
    torch.testing.assert_close(contrast(scale * maps + offset, labels, 0.5), expected)
    order = torch.tensor(chance.sample(range(len(labels)), len(labels)))
    torch.testing.assert_close(contrast(maps[order], labels[order], 0.5), expected)
    renamed = torch.tensor(chance.sample(range(9), 4))[labels]
    torch.testing.assert_close(contrast(maps, renamed, 0.5), expected)
    cells = torch.tensor(chance.sample(range(maps[0].numel()), maps[0].numel()))
    torch.testing.assert_close(contrast(maps.flatten(1)[:, cells][:, None], labels, 0.5), expected)


@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [0, 1, 2, 3], [0, -1, -1, -1]])
def test_without_pairs_or_without_others_there_is_nothing_to_gain(labels: list[int]) -> None:
    maps = exact(4, 3, 3).requires_grad_()
    found = contrast(maps, torch.tensor(labels), 0.5)
    found.backward()
    assert found.item() == 0
    assert maps.grad is not None
    assert not maps.grad.any()


def test_maps_that_belong_to_no_concept_are_left_out() -> None:
    maps, padded = exact(4, 3, 3), exact(6, 3, 3, seed=1)
    padded[[0, 1, 3, 4]] = maps
    groups = torch.tensor([0, 0, -1, 1, 1, -1])
    torch.testing.assert_close(contrast(padded, groups, 0.5), contrast(maps, LABELS, 0.5))


def test_a_constant_map_among_others_gives_finite_numbers() -> None:
    maps = exact(4, 3, 3)
    maps[1] = 0.25
    maps.requires_grad_()
    found = contrast(maps, LABELS, 0.5)
    found.backward()
    assert math.isfinite(found.item())
    assert maps.grad is not None
    assert maps.grad.isfinite().all()
    assert maps.grad.abs().max() < 100


def test_every_image_has_a_contrastive_loss_of_its_own() -> None:
    maps, groups = exact(2, 4, 3, 3), torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1]])
    both = contrast(maps, groups, 0.5)
    assert both.shape == (2,)
    for one, image, labels in zip(both, maps, groups, strict=True):
        torch.testing.assert_close(one, contrast(image, labels, 0.5))


def test_the_gradient_of_the_contrastive_loss_equals_finite_differences() -> None:
    maps = exact(5, 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: contrast(x, torch.tensor([0, 0, 1, 1, 0]), 0.5), maps)
