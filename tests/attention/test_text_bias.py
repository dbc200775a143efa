"""A bias between image and text as further channels of queries and keys."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from components import seeded
from lora_compose.attention import TextBias


def factors(rows: int, cells: int, tokens: int, subjects: int, seed: int = 0) -> TextBias:
    generator = seeded(seed)
    return TextBias(
        {1: torch.randn(rows, cells, subjects, generator=generator)},
        torch.randn(rows, tokens, subjects, generator=generator),
    )


def dense(bias: TextBias, positions: int, text: slice, image: slice) -> Tensor:
    """What is added between all positions. Shape: [rows, positions, positions]."""
    scores = bias.cells[1] @ bias.tokens.transpose(1, 2)
    every = torch.zeros(len(scores), positions, positions)
    end = text.start + scores.shape[2]
    every[:, image, text.start : end] = scores
    every[:, text.start : end, image] = scores.transpose(1, 2)
    return every


@given(
    cells=st.integers(1, 6), tokens=st.integers(1, 5), subjects=st.integers(1, 9), text_first=st.booleans(),
    spare=st.integers(0, 3),
)  # fmt: skip
def test_products_of_the_channels_are_the_bias_in_both_directions_and_0_elsewhere(
    cells, tokens, subjects, text_first, spare
):
    bias, length = factors(2, cells, tokens, subjects), tokens + spare
    text, image = slice(0, length), slice(length, length + cells)
    if not text_first:
        image, text = slice(0, cells), slice(cells, cells + length)
    positions = cells + length + 1
    query, key = bias.channels(1, positions, text, image, scale=0.25)
    assert query.shape[2] % 8 == 0
    found = 0.25 * query @ key.transpose(1, 2)
    torch.testing.assert_close(found, dense(bias, positions, text, image), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_with_the_channels_is_attention_with_the_bias(dtype):
    bias, (text, image) = factors(2, 6, 4, 2), (slice(0, 4), slice(4, 10))
    query, key, value = (torch.randn(2, 3, 10, 16, generator=seeded(i)) for i in range(3))
    expected = scaled_dot_product_attention(query, key, value, dense(bias, 10, text, image)[:, None])
    more = bias.channels(1, 10, text, image, scale=16**-0.5)
    wide_query, wide_key = (
        torch.cat([x, channels[:, None].expand(-1, 3, -1, -1)], dim=-1).to(dtype)
        for x, channels in zip((query, key), more, strict=True)
    )
    attended = scaled_dot_product_attention(wide_query, wide_key, value.to(dtype), scale=16**-0.5).float()
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(attended, expected, atol=tolerance, rtol=tolerance)


def test_some_of_the_rows_have_the_bias_of_those_rows():
    bias = factors(3, 5, 4, 2)
    for rows in (slice(1, 3), [2, 0]):
        torch.testing.assert_close(bias.select(rows).scores()[1], bias.scores()[1][rows])
