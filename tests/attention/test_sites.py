"""Parts of a layer's sequence, and grids of latent cells after halvings."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_compose.attention import Site, coarser, grid_at


@given(st.integers(1, 200), st.integers(1, 200), st.integers(0, 4))
def test_grids_shrink_as_strided_convolutions_do(height: int, width: int, level: int) -> None:
    x: Tensor = torch.zeros(1, 1, height, width)
    for _ in range(level):
        x = F.conv2d(x, torch.zeros(1, 1, 3, 3), stride=2, padding=1)
    assert grid_at((height, width), level) == tuple(x.shape[2:])


@given(st.integers(0, 60), st.integers(1, 60), st.integers(0, 4))
def test_an_interval_keeps_all_its_cells_on_coarser_grids(start: int, length: int, level: int) -> None:
    coarse = coarser(slice(start, start + length), level)
    assert {cell >> level for cell in range(start, start + length)} == set(range(coarse.start, coarse.stop))


def test_a_site_has_the_parts_that_exist_in_their_order() -> None:
    site = Site("image", "text", level=1, multiple=4)
    assert site.joint
    assert site != Site("text", "image", level=1, multiple=4)
    assert site.with_parts("text") == Site("text", level=1, multiple=4)
    assert not Site("image", "reference").joint
    for parts in ((), ("joint",), ("image", 1)):
        with pytest.raises(ValueError, match="the parts of a site are some of text, image, reference, other, row"):
            Site(*parts)  # pyright: ignore[reportArgumentType]
