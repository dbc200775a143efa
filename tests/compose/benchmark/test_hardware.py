"""What a card needs: computed from configurations, and the same numbers in the docs."""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import pytest

from doc_tables import rows_of
from lora_compose.compose.benchmark.hardware import (
    BANDWIDTH,
    CARDS,
    MODELS,
    SHARE,
    Need,
    capacity_table,
    need,
    needs_table,
    seconds_table,
)
from lora_compose.compose.benchmark.tables import GIB

DOCS = Path(__file__).parents[3]


USUAL = ("SD 1.5", "FLUX.1", "Z-Image")
"""Models whose rows are computed by default."""

need_of = cache(need)


def needs(models: Sequence[str] = MODELS) -> dict[str, Need]:
    return {model: need_of(model) for model in models}


@pytest.fixture(params=[USUAL, pytest.param(MODELS, marks=pytest.mark.slow)], ids=["usual", "all"])
def found(request: pytest.FixtureRequest) -> dict[str, Need]:
    return needs(request.param)


def published(page: str, after: str, found: Mapping[str, Need]) -> dict[str, list[str]]:
    """The rows of a table of the docs, which has all models, about these."""
    rows = rows_of(page, after)
    assert rows.keys() == set(MODELS)
    return {model: rows[model] for model in found}


def cells(table: object) -> dict[str, list[str]]:
    """The rows of a table by their first cell."""
    columns = [list(column.cells) for column in table.columns]  # pyright: ignore[reportAttributeAccessIssue]
    return {name: [column[i] for column in columns[1:]] for i, name in enumerate(columns[0])}


@pytest.mark.slow  # numbers that were published do not change
def test_sizes_of_models_are_those_of_their_published_numbers_of_parameters():
    """CLIP L 123 M, SD 1.5's UNet 860 M, T5 XXL's encoder 4.76 G, FLUX.1 11.9 G, Qwen3-4B 4.02 G."""
    found = needs()
    assert found["SD 1.5"].text / 2 == pytest.approx(123e6, rel=0.01)
    assert found["SD 1.5"].weights / 2 == pytest.approx(860e6, rel=0.01)
    assert found["FLUX.1"].text / 2 == pytest.approx(123e6 + 4.76e9, rel=0.01)
    assert found["FLUX.1"].weights / 2 == pytest.approx(11.9e9, rel=0.01)
    assert found["Z-Image"].text / 2 == pytest.approx(4.02e9, rel=0.01)


@pytest.mark.slow
def test_less_memory_is_needed_one_model_at_a_time_and_with_fewer_bits():
    for model, it in needs().items():
        assert it.apart_nf4 <= it.apart_fp8 <= it.apart < it.together, model
        assert it.apart_int8 <= it.apart_fp8
        assert it.weights < it.denoiser
        assert it.blocks is None or it.blocks < it.nf4


def test_memory_in_the_docs_is_what_the_command_prints(found):
    assert published("docs/memory.md", "## What a card holds", found) == cells(needs_table(found))


def test_sizes_in_recipes_are_in_the_table():
    text = (DOCS / "docs/memory.md").read_text(encoding="utf-8")
    recipes = text[text.index("## 12 GB") : text.index("## Fewer bits")]
    known = {cell for row in rows_of("docs/memory.md", "## What a card holds").values() for cell in row}
    said = set(re.findall(r"\d+\.\d", re.sub(r"```.*?```", "", recipes, flags=re.DOTALL).replace("FLUX.1", "")))
    assert said
    assert said <= known


def test_a_file_in_four_bits_and_a_half_needs_what_the_docs_say():
    """The denoiser from a file, the text encoders in half precision, one after the other."""
    flux = need_of("FLUX.1")
    text = " ".join((DOCS / "docs/memory.md").read_text(encoding="utf-8").split())
    said = re.findall(r"Q4_K_S(?: \(`pip install gguf`\): | \(4\.5 bits a weight\) )(\d+\.\d) GiB", text)
    assert said == [f"{max(flux.text, flux.nf4, flux.decoding) / GIB:.1f}"] * 2
    assert flux.nf4 < flux.text


def test_hardware_in_the_readme_is_what_the_command_prints(found):
    computed = {model: [row[3], row[4], row[7]] for model, row in cells(needs_table(found)).items()}
    assert published("README.md", "## Hardware", found) == computed


def test_seconds_in_the_docs_are_counted_flops_by_a_share_of_the_peak(found):
    computed = cells(seconds_table(found))
    assert published("docs/faq.md", "## How long does an image take on a GPU?", found) == computed
    assert float(computed["FLUX.1"][-1]) == pytest.approx(found["FLUX.1"].flops / (989e12 * SHARE), rel=0.05)
    assert "SDXL" not in found or found["SDXL"].denoiser / GIB < 6


def test_cards_for_many_images_in_the_docs_are_what_the_command_prints(found):
    assert published("docs/costs.md", "## A thousand images a minute", found) == cells(capacity_table(found))


def test_reading_the_weights_takes_a_third_of_the_arithmetic_at_most(found):
    for it in found.values():
        for card, tera in CARDS.items():
            assert it.steps * it.weights / (BANDWIDTH[card] * 1e9) < it.flops / (tera * 1e12) / 3


def test_bandwidths_of_cards_with_known_memory_are_bits_by_their_rate():
    assert BANDWIDTH["RTX 3090"] == 384 * 19.5 / 8
    assert BANDWIDTH["RTX 4090"] == 384 * 21 / 8
