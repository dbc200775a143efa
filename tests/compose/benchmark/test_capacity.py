"""Cards for many requests, from counts and data sheets."""

from dataclasses import replace

import pytest

from lora_compose.compose.benchmark.hardware import BANDWIDTH, CARDS, REQUESTS, SHARE, Need, capacity_table, seconds

NEED = Need(
    text=0,
    weights=2 * 10**9,
    denoiser=0,
    text_int8=0,
    nf4=0,
    opening_nf4=0,
    int8=0,
    blocks=None,
    decoding=0,
    vae=0,
    steps=25,
    flops=10**14,
)


def test_an_image_takes_as_long_as_its_arithmetic_or_as_the_reading_of_the_weights():
    assert BANDWIDTH.keys() == CARDS.keys()
    assert seconds(NEED, "A100") == pytest.approx(100 / 312 / SHARE)
    reading = replace(NEED, flops=10**9)
    assert seconds(reading, "A100") == pytest.approx(25 * 2 / 2039 / SHARE)


def test_cards_are_those_that_so_many_images_keep_busy():
    table = capacity_table({"one": NEED})
    cells = [next(iter(column.cells)) for column in table.columns]
    assert cells[:3] == ["one", "100", "0.05"]
    assert cells[3:] == [f"{REQUESTS / 60 * seconds(NEED, card):.0f}" for card in CARDS]
