"""The contrastive loss of CLoRA (arXiv 2403.19776) has the values of its formula."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.losses import NTXentLoss
from torch import Tensor

from lora_compose.pipelines.losses import contrast

SETTINGS = settings(deadline=None, max_examples=40)
LABELS = torch.tensor([0, 0, 1, 1])


def loss(rows: Sequence[Sequence[float]], labels: list[int], temperature: float = 0.5) -> float:
    maps = torch.tensor(rows, dtype=torch.float64)[:, None]
    return contrast(maps, torch.tensor(labels), temperature).item()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Maps on a small grid and their groups."""
    labels = draw(st.lists(st.integers(0, 3), min_size=2, max_size=8))
    shape = len(labels), draw(st.integers(1, 4)), draw(st.integers(2, 4))
    return random(*shape, seed=draw(st.integers(0, 10**6))), torch.tensor(labels)


def test_groups_that_are_apart_and_groups_that_are_mixed_have_known_values() -> None:
    together = loss([[1, 0], [1, 0], [0, 1], [0, 1]], [0, 0, 1, 1])
    mixed = loss([[1, 0], [0, 1], [1, 0], [0, 1]], [0, 0, 1, 1])
    assert together == pytest.approx(math.log(1 + 2 * math.exp(-2)), abs=1e-6) == 0.23954476
    assert mixed == pytest.approx(math.log(2 + math.exp(2)), abs=1e-6)
    assert mixed == pytest.approx(2.23954, abs=1e-5)


@pytest.mark.parametrize("negatives", [1, 2, 4])
def test_maps_that_are_all_alike_cost_the_logarithm_of_their_number(negatives: int) -> None:
    rows, labels = [[0.1, 0.7, 0.2]] * (2 * negatives), [0] * negatives + [1] * negatives
    if negatives > 1:
        assert loss(rows, labels) == pytest.approx(math.log(1 + negatives))
    else:
        assert loss(rows, labels) == 0  # no map has a partner


def test_two_concepts_of_one_token_have_the_published_range() -> None:
    labels = [0] * 4 + [1] * 4
    best = loss([[1, 0]] * 4 + [[0, 1]] * 4, labels)
    assert best == pytest.approx(math.log(1 + 4 * math.exp(-2)), abs=1e-6)
    assert best == pytest.approx(0.4327, abs=1e-4)


@SETTINGS
@given(cases(), st.floats(0.1, 2))
def test_the_loss_equals_an_independent_one(case: tuple[Tensor, Tensor], temperature: float) -> None:
    maps, labels = case
    lowest = maps.flatten(1) - maps.flatten(1).amin(dim=1, keepdim=True)
    expected = NTXentLoss(temperature)(lowest, labels)
    assert contrast(maps, labels, temperature).item() == pytest.approx(float(expected), abs=1e-5)


@SETTINGS
@given(cases(), st.floats(0.2, 5), st.floats(0, 3), st.randoms(use_true_random=False))
def test_scale_offset_and_order_do_not_count(case: tuple[Tensor, Tensor], scale: float, offset: float, chance) -> None:
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
    maps = random(4, 3, 3).requires_grad_()
    found = contrast(maps, torch.tensor(labels), 0.5)
    found.backward()
    assert found.item() == 0
    assert maps.grad is not None
    assert not maps.grad.any()


def test_maps_that_belong_to_nobody_are_left_out() -> None:
    maps, padded = random(4, 3, 3), random(6, 3, 3, seed=1)
    padded[[0, 1, 3, 4]] = maps
    groups = torch.tensor([0, 0, -1, 1, 1, -1])
    torch.testing.assert_close(contrast(padded, groups, 0.5), contrast(maps, LABELS, 0.5))


def test_a_constant_map_gives_finite_numbers() -> None:
    maps = random(4, 3, 3)
    maps[1] = 0.25
    maps.requires_grad_()
    found = contrast(maps, LABELS, 0.5)
    found.backward()
    assert math.isfinite(found.item())
    assert maps.grad is not None
    assert maps.grad.isfinite().all()
    assert maps.grad.abs().max() < 100


def test_every_image_has_a_loss_of_its_own() -> None:
    maps, groups = random(2, 4, 3, 3), torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1]])
    both = contrast(maps, groups, 0.5)
    assert both.shape == (2,)
    for one, image, labels in zip(both, maps, groups, strict=True):
        torch.testing.assert_close(one, contrast(image, labels, 0.5))


def test_moving_groups_apart_lowers_the_loss() -> None:
    places = torch.linspace(0, 7, 8, dtype=torch.float64)

    def bumps(distance: float) -> Tensor:
        centres = torch.tensor([3.5 - distance] * 2 + [3.5 + distance] * 2, dtype=torch.float64)
        return torch.exp(-(places - centres[:, None]).square())[:, None]

    losses = [contrast(bumps(distance), LABELS, 0.5).item() for distance in (0.0, 0.5, 1.0, 2.0, 3.0)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1] + 0.5


def test_the_gradient_is_the_slope() -> None:
    maps = random(5, 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: contrast(x, torch.tensor([0, 0, 1, 1, 0]), 0.5), maps)
