"""Latent re-initialisation moves the noise in which a concept finds most into its region."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from components import seeded
from lora_compose.pipelines.methods.reinit import reinitialised

CHANNELS, FACTOR = 3, 2

Grid = tuple[int, int]
Box = tuple[int, int, int, int]
"""top, left, bottom, right in cells of the map grid."""


def noise(grid: Grid, *, images: int = 1, factor: int = FACTOR, seed: int = 0) -> Tensor:
    generator = seeded(seed)
    return torch.randn(images, CHANNELS, grid[0] * factor, grid[1] * factor, generator=generator)


def boxed(box: Box, grid: Grid) -> Tensor:
    region = torch.zeros(grid, dtype=torch.bool)
    region[box[0] : box[2], box[1] : box[3]] = True
    return region


def peaks(*windows: Tensor) -> Tensor:
    """Attention of one image, of each region in its window. Shape: [1, regions, height, width]."""
    return torch.stack(windows).float()[None]


def part(latents: Tensor, region: Tensor, factor: int = FACTOR) -> Tensor:
    """The latent cells of a region, in order, on grids that were not rounded up. Shape: [images, channels, cells]."""
    fine = region.repeat_interleave(factor, dim=0).repeat_interleave(factor, dim=1)
    return latents[:, :, fine]


def moments(latents: Tensor) -> Tensor:
    return torch.stack([latents.mean(dim=(1, 2, 3)), latents.std(dim=(1, 2, 3))])


def values(latents: Tensor) -> Tensor:
    """The sorted values of every channel."""
    return latents.flatten(2).sort(dim=2).values


@st.composite
def boxes(draw: st.DrawFn, grid: Grid) -> Tensor:
    top, left = draw(st.integers(0, grid[0] - 1)), draw(st.integers(0, grid[1] - 1))
    return boxed((top, left, draw(st.integers(top + 1, grid[0])), draw(st.integers(left + 1, grid[1]))), grid)


@st.composite
def scenes(draw: st.DrawFn) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Latents of two images on a grid of 4 x 5, their scores, and regions that may overlap."""
    grid, seed = (4, 5), draw(st.integers(0, 2**16))
    regions = draw(st.lists(boxes(grid), min_size=1, max_size=3))
    scores = torch.rand(2, len(regions), *grid, generator=seeded(seed))
    return noise(grid, images=2, seed=seed), scores, regions


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_swapping_exchanges_the_region_with_the_window_that_draws_attention(factor: int) -> None:
    grid = (5, 7)
    region, window = boxed((0, 0, 2, 3), grid), boxed((3, 4, 5, 7), grid)
    latents = noise(grid, factor=factor)
    found = reinitialised(latents, peaks(window), [region], factor, swap=True)
    assert torch.equal(part(found, region, factor), part(latents, window, factor))
    assert torch.equal(part(found, window, factor), part(latents, region, factor))
    elsewhere = ~region & ~window
    assert torch.equal(part(found, elsewhere, factor), part(latents, elsewhere, factor))


def test_copying_leaves_the_window_as_it_was_but_for_the_scale() -> None:
    grid = (5, 7)
    region, window = boxed((0, 0, 2, 3), grid), boxed((2, 3, 4, 6), grid)
    latents = noise(grid)
    copied = latents.clone()
    copied[..., :4, :6] = latents[..., 4:8, 6:12]
    expected = (copied - copied.mean()) * (latents.std() / copied.std()) + latents.mean()
    found = reinitialised(latents, peaks(window), [region], FACTOR, swap=False)
    torch.testing.assert_close(found, expected)


def test_concepts_may_copy_the_same_noise() -> None:
    grid = (4, 6)
    window, regions = boxed((1, 4, 3, 6), grid), [boxed((0, 0, 2, 2), grid), boxed((2, 2, 4, 4), grid)]
    found = reinitialised(noise(grid), peaks(window, window), regions, FACTOR, swap=False)
    for region in regions:
        torch.testing.assert_close(part(found, region), part(found, window))


def test_copies_come_from_the_noise_as_it_was() -> None:
    grid = (2, 6)
    first, second, third = (boxed((0, left, 2, left + 2), grid) for left in (0, 2, 4))
    latents = noise(grid)
    found = reinitialised(latents, peaks(third, first), [first, second], FACTOR, swap=False)
    copied = torch.cat([part(latents, third), part(latents, first), part(latents, third)], dim=2)
    expected = (copied - copied.mean()) / copied.std() * latents.std() + latents.mean()
    torch.testing.assert_close(torch.cat([part(found, region) for region in (first, second, third)], dim=2), expected)


@given(scenes())
def test_copying_keeps_mean_and_deviation_of_every_image(scene: tuple[Tensor, Tensor, list[Tensor]]) -> None:
    latents, scores, regions = scene
    found = reinitialised(latents * 1.3 + 0.2, scores, regions, FACTOR, swap=False)
    torch.testing.assert_close(moments(found), moments(latents * 1.3 + 0.2))


@given(scenes(), st.booleans())
def test_images_do_not_depend_on_each_other(scene: tuple[Tensor, Tensor, list[Tensor]], swap: bool) -> None:
    latents, scores, regions = scene
    together = reinitialised(latents, scores, regions, FACTOR, swap=swap)
    for i in range(2):
        alone = reinitialised(latents[i : i + 1], scores[i : i + 1], regions, FACTOR, swap=swap)
        assert torch.equal(together[i], alone[0])


@pytest.mark.parametrize("box", [(1, 2, 3, 5), (0, 0, 4, 6), (0, 0, 1, 1), (3, 5, 4, 6)])
def test_a_region_that_draws_the_attention_itself_keeps_its_noise(box: Box) -> None:
    grid = (4, 6)
    region, latents = boxed(box, grid), noise(grid)
    assert torch.equal(reinitialised(latents, peaks(region), [region], FACTOR, swap=True), latents)
    torch.testing.assert_close(reinitialised(latents, peaks(region), [region], FACTOR, swap=False), latents)


def windows_of(region: Tensor) -> list[Tensor]:
    """Everything that a region can be moved to."""
    cells = region.nonzero().tolist()
    height, width = region.shape
    found = []
    for down in range(-height, height):
        for right in range(-width, width):
            moved = [(y + down, x + right) for y, x in cells]
            if all(0 <= y < height and 0 <= x < width for y, x in moved):
                found.append(torch.zeros_like(region))
                found[-1][tuple(zip(*moved, strict=True))] = True
    return found


@given(scenes(), st.integers(0, 2**16))
def test_free_regions_get_the_best_window_that_is_free(scene: tuple[Tensor, Tensor, list[Tensor]], seed: int) -> None:
    """Against a search through all windows; the regions are apart and full of holes."""
    latents, scores, regions = scene
    holes = torch.rand(4, 5, generator=seeded(seed)) > 0.6
    masks, covered = [], holes
    for region in regions:
        masks.append(region & ~covered)
        covered = covered | region
    scores = scores[:, [n for n, mask in enumerate(masks) if mask.any()]]
    masks = [mask for mask in masks if mask.any()]
    found = reinitialised(latents, scores, masks, FACTOR, swap=True)
    for i in range(2):
        taken = torch.zeros(4, 5, dtype=torch.bool)
        for n, mask in enumerate(masks):
            free = [window for window in windows_of(mask) if not (window & taken).any()]
            if not free:
                continue
            best = max(free, key=lambda window: scores[i, n][window].double().sum().item())
            assert torch.equal(part(found, mask)[i], part(latents, best)[i])
            taken |= mask | best


def test_latents_that_do_not_fill_the_last_cells_of_the_grid() -> None:
    latents = torch.randn(1, CHANNELS, 7, 9, generator=seeded())
    grid = (2, 3)  # of 4 x 4 latent cells, rounded up
    corner, first = boxed((1, 2, 2, 3), grid), boxed((0, 0, 1, 1), grid)
    for region, window in ((corner, first), (first, corner)):
        found = reinitialised(latents, peaks(window), [region], 4, swap=True)
        expected = latents.clone()
        expected[..., 4:7, 8:9] = latents[..., 0:3, 0:1]
        expected[..., 0:3, 0:1] = latents[..., 4:7, 8:9]
        assert torch.equal(found, expected)
        found = reinitialised(latents, peaks(window), [region], 4, swap=False)
        torch.testing.assert_close(moments(found), moments(latents))


@given(st.integers(1, 11), st.integers(1, 11), st.integers(1, 4), st.integers(0, 2**16), st.data())
def test_latents_of_any_size_keep_their_values(
    height: int, width: int, factor: int, seed: int, data: st.DataObject
) -> None:
    grid = (-(-height // factor), -(-width // factor))
    generator = seeded(seed)
    latents, scores = (torch.randn(1, n, *size, generator=generator) for n, size in ((2, (height, width)), (2, grid)))
    regions = [data.draw(boxes(grid)) for _ in range(2)]
    found = reinitialised(latents, scores.abs(), regions, factor, swap=True)
    assert torch.equal(values(found), values(latents))


@pytest.mark.parametrize("swap", [True, False])
def test_the_latents_given_are_left_alone(swap: bool) -> None:
    grid = (3, 4)
    latents = noise(grid)
    before = latents.clone()
    region, window = boxed((0, 0, 2, 2), grid), boxed((1, 2, 3, 4), grid)
    reinitialised(latents, peaks(window), [region.float()], FACTOR, swap=swap)
    assert torch.equal(latents, before)
