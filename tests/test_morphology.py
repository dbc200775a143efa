"""Masks from attention maps, and what grows and shrinks them, against scipy."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import Tensor

from lora_compose.attention.masks import closed, dilated, eroded, opened, strongest

SETTINGS = settings(deadline=None, max_examples=60)
NEIGHBOURS = torch.ones(3, 3, dtype=torch.bool).numpy()


@st.composite
def masks(draw: st.DrawFn) -> Tensor:
    shape = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    return torch.rand(shape, generator=generator) < draw(st.floats(0, 1))


def maps(seed: int, height: int = 5, width: int = 7) -> Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))


@SETTINGS
@given(masks())
def test_growing_and_shrinking_equal_an_independent_implementation(mask: Tensor) -> None:
    grown = ndimage.binary_dilation(mask.numpy(), NEIGHBOURS)
    shrunk = ndimage.binary_erosion(mask.numpy(), NEIGHBOURS, border_value=1)  # the border takes nothing away
    assert torch.equal(dilated(mask), torch.from_numpy(grown))
    assert torch.equal(eroded(mask), torch.from_numpy(shrunk))


@SETTINGS
@given(masks())
def test_every_change_keeps_its_side_of_the_mask(mask: Tensor) -> None:
    assert not (eroded(mask) & ~mask).any()
    assert not (opened(mask) & ~mask).any()
    assert not (mask & ~closed(mask)).any()
    assert not (mask & ~dilated(mask)).any()
    assert torch.equal(opened(opened(mask)), opened(mask))
    assert torch.equal(closed(closed(mask)), closed(mask))


def test_a_mask_of_everything_survives_up_to_the_border() -> None:
    assert eroded(torch.ones(4, 6, dtype=torch.bool)).all()


def test_masks_of_a_batch_do_not_touch_each_other() -> None:
    both = torch.zeros(2, 4, 4, dtype=torch.bool)
    both[0, 1, 1] = True
    assert dilated(both)[0].sum() == 9
    assert not dilated(both)[1].any()


def test_a_threshold_of_0_takes_every_cell_that_is_seen_at_all() -> None:
    map_ = torch.tensor([[0.0, 0.2], [0.0, 1.0]])
    assert strongest(map_, 0.0).tolist() == [[False, True], [False, True]]


@SETTINGS
@given(st.integers(0, 10**6), st.floats(0, 0.999), st.floats(0, 0.999))
def test_higher_thresholds_take_fewer_cells_and_never_lose_the_highest(seed: int, one: float, other: float) -> None:
    low, high = sorted((one, other))
    found = maps(seed)
    assert not (strongest(found, high) & ~strongest(found, low)).any()
    highest = found == found.amax(dim=(-2, -1), keepdim=True)
    assert (strongest(found, high) & highest).flatten(1).any(dim=1).all()


@pytest.mark.parametrize("scale", [1e-6, 1.0, 40.0])
def test_the_scale_of_a_map_does_not_count(scale: float) -> None:
    assert torch.equal(strongest(maps(3) * scale, 0.4), strongest(maps(3), 0.4))
