"""Boxes and masks on grids of latent cells, and masks from attention maps."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage
from torch import Tensor

from lora_compose.attention import grid_at
from lora_compose.attention.masks import (
    Box,
    box_mask,
    cells_of,
    closed,
    coarse_mask,
    dilated,
    eroded,
    opened,
    resize_mask,
    thresholded,
)

NEIGHBOURS = torch.ones(3, 3, dtype=torch.bool).numpy()  # for scipy


@pytest.mark.parametrize(
    ("box", "image", "grid", "expected"),
    [
        # the right half
        ((64, 0, 128, 128), (128, 128), (2, 4), [[0, 0, 1, 1], [0, 0, 1, 1]]),
        # one and a half columns, two of four rows
        ((0, 32, 48, 96), (128, 128), (4, 4), [[0, 0, 0, 0], [1, 0.5, 0, 0], [1, 0.5, 0, 0], [0, 0, 0, 0]]),
        # wide image: cells of 8 x 8 pixels
        ((8, 4, 24, 16), (16, 32), (2, 4), [[0, 0.5, 0.5, 0], [0, 1, 1, 0]]),
        # tall image with cells of 8 x 4 pixels
        ((0, 8, 6, 32), (32, 8), (4, 2), [[0, 0], [1, 0.5], [1, 0.5], [1, 0.5]]),
        # everything
        ((0, 0, 100, 50), (50, 100), (3, 5), [[1] * 5] * 3),
        # a pixel that lies in one cell
        ((127, 127, 128, 128), (128, 128), (2, 2), [[0, 0], [0, 1]]),
        # two pixels on a border between cells
        ((63, 0, 65, 1), (128, 128), (2, 2), [[1, 1], [0, 0]]),
        # three pixels, one on this and two on that side of a border
        ((63, 10, 66, 20), (128, 128), (2, 2), [[0.5, 1], [0, 0]]),
    ],
)
def test_boxes_cover_cells_by_their_share(
    box: Box, image: tuple[int, int], grid: tuple[int, int], expected: list
) -> None:
    torch.testing.assert_close(box_mask(box, image, grid), torch.tensor(expected, dtype=torch.float32))


@st.composite
def boxes(draw: st.DrawFn, most: int = 40) -> tuple[Box, tuple[int, int]]:
    height, width = draw(st.integers(1, most)), draw(st.integers(1, most))
    left, top = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    right, bottom = draw(st.integers(left + 1, width)), draw(st.integers(top + 1, height))
    return (left, top, right, bottom), (height, width)


def painted(box: Box, image: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The share of every cell that a box covers, counted on a canvas with a whole number of dots per pixel and cell."""
    (left, top, right, bottom), (height, width), (rows, columns) = box, image, grid
    y, x = math.lcm(height, rows), math.lcm(width, columns)
    canvas = torch.zeros(y, x)
    canvas[top * y // height : bottom * y // height, left * x // width : right * x // width] = 1
    return canvas.view(rows, y // rows, columns, x // columns).mean(dim=(1, 3))


@given(boxes(), st.integers(1, 9), st.integers(1, 9))
def test_boxes_equal_a_painted_canvas(case: tuple[Box, tuple[int, int]], rows: int, columns: int) -> None:
    box, image = case
    share = painted(box, image, (rows, columns))
    torch.testing.assert_close(box_mask(box, image, (rows, columns)), share / share.max(), atol=1e-5, rtol=0)


def test_masks_are_averaged_over_cells() -> None:
    mask = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0]])
    expected = torch.tensor([[1.0, 0.25, 0.0], [0.0, 0.0, 0.25]])
    torch.testing.assert_close(resize_mask(mask, (2, 3)), expected)


def test_small_masks_reach_one_and_empty_ones_stay_empty() -> None:
    mask = torch.zeros(64, 64)
    assert torch.equal(resize_mask(mask, (4, 4)), torch.zeros(4, 4))
    mask[17, 33] = 1
    expected = torch.zeros(4, 4)
    expected[1, 2] = 1
    torch.testing.assert_close(resize_mask(mask, (4, 4)), expected)


def whole_cells(box: Box, image: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The cells that lie inside a box altogether: from the first edge in it to the last one, in whole numbers."""
    (left, top, right, bottom), (height, width), (rows, columns) = box, image, grid
    expected = torch.zeros(grid, dtype=torch.bool)
    first_row, first_column = -(-top * rows // height), -(-left * columns // width)
    expected[first_row : bottom * rows // height, first_column : right * columns // width] = True
    return expected


@st.composite
def roomy_boxes(draw: st.DrawFn) -> tuple[Box, tuple[int, int], tuple[int, int]]:
    """Box, image and grid; the box holds at least one whole cell."""

    def side() -> tuple[int, int, int, int]:
        pixels, cells = draw(st.integers(1, 2048)), draw(st.integers(1, 64))
        first = draw(st.integers(0, cells - 1))
        last = draw(st.integers(first + 1, cells))
        start = draw(st.integers(0, first * pixels // cells))
        return start, draw(st.integers(-(-last * pixels // cells), pixels)), pixels, cells

    top, bottom, height, rows = side()
    left, right, width, columns = side()
    return (left, top, right, bottom), (height, width), (rows, columns)


@given(roomy_boxes())
def test_cells_of_a_box_are_those_inside_it_altogether(case: tuple[Box, tuple[int, int], tuple[int, int]]) -> None:
    box, image, grid = case
    cells = cells_of(box_mask(box, image, grid), 1.0)
    assert cells.any()
    assert torch.equal(cells, whole_cells(box, image, grid))


@pytest.mark.parametrize("image", [(512, 512), (768, 1024), (520, 776), (1000, 8), (1, 1)])
def test_the_whole_canvas_is_inside_on_every_grid(image: tuple[int, int]) -> None:
    height, width = image
    for level in range(8):
        grid = grid_at((-(-height // 8), -(-width // 8)), level)
        assert cells_of(box_mask((0, 0, width, height), image, grid), 1.0).all()


@given(boxes(most=4096), st.integers(1, 130), st.integers(1, 130), st.floats(0, 1))
def test_every_box_has_a_cell_on_every_grid(
    case: tuple[Box, tuple[int, int]], rows: int, columns: int, threshold: float
) -> None:
    mask = box_mask(*case, (rows, columns))
    cells = cells_of(mask, threshold)
    assert cells.dtype == torch.bool
    assert cells.shape == mask.shape
    assert cells.any()
    assert cells[mask == 1].all()
    assert not (cells_of(mask, 1.0) & ~cells).any(), "a lower threshold takes more cells"


def test_cells_are_taken_from_a_share_on() -> None:
    mask = torch.tensor([[0.0, 0.2, 0.5], [0.7, 0.99, 1.0]])
    assert cells_of(mask, 0.5).tolist() == [[False, False, True], [True, True, True]]
    assert cells_of(mask, 0.7).tolist() == [[False, False, False], [True, True, True]]
    assert cells_of(mask, 1.0).tolist() == [[False, False, False], [False, False, True]]


def test_coarser_masks_are_means_of_the_cells_that_are_joined() -> None:
    mask = torch.tensor([[1.0, 1, 0, 0, 0], [1, 0, 0, 0, 1], [0, 0, 0, 0, 0]])
    assert torch.equal(coarse_mask(mask, 0), mask)
    expected = torch.tensor([[0.75, 0, 0.5], [0, 0, 0]]) / 0.75
    torch.testing.assert_close(coarse_mask(mask, 1), expected)
    assert coarse_mask(mask, 3).tolist() == [[1.0]]
    assert coarse_mask(torch.zeros(3, 5), 1).max() == 0


@st.composite
def bool_masks(draw: st.DrawFn) -> Tensor:
    shape = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    return torch.rand(shape, generator=generator) < draw(st.floats(0, 1))


def maps(seed: int, height: int = 5, width: int = 7) -> Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))


@given(bool_masks())
def test_growing_and_shrinking_equal_an_independent_implementation(mask: Tensor) -> None:
    grown = ndimage.binary_dilation(mask.numpy(), NEIGHBOURS)
    shrunk = ndimage.binary_erosion(mask.numpy(), NEIGHBOURS, border_value=1)  # the border takes nothing away
    assert torch.equal(dilated(mask), torch.from_numpy(grown))
    assert torch.equal(eroded(mask), torch.from_numpy(shrunk))


@given(bool_masks())
def test_opening_takes_away_and_closing_adds_and_a_second_time_changes_nothing(mask: Tensor) -> None:
    assert not (opened(mask) & ~mask).any()
    assert not (mask & ~closed(mask)).any()
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
    assert thresholded(map_, 0.0).tolist() == [[False, True], [False, True]]


@given(st.integers(0, 10**6), st.floats(0, 0.999), st.floats(0, 0.999))
def test_higher_thresholds_take_fewer_cells_and_never_lose_the_highest(seed: int, one: float, other: float) -> None:
    low, high = sorted((one, other))
    found = maps(seed)
    assert not (thresholded(found, high) & ~thresholded(found, low)).any()
    highest = found == found.amax(dim=(-2, -1), keepdim=True)
    assert (thresholded(found, high) & highest).flatten(1).any(dim=1).all()


@pytest.mark.parametrize("scale", [1e-6, 1.0, 40.0])
def test_the_scale_of_a_map_does_not_count(scale: float) -> None:
    assert torch.equal(thresholded(maps(3) * scale, 0.4), thresholded(maps(3), 0.4))
