"""Numbers in sentences of the docs are those of the tables beside them.

That the tables of costs are what the commands print: `compose/benchmark/test_published_costs.py`, `test_growth.py` and
`test_hardware.py`.
"""

import re
from collections.abc import Mapping

import pytest

from doc_tables import rows_of, table, text_of


def flops() -> Mapping[tuple[str, str], tuple[float, float]]:
    """FLOPs of SD 1.5 and SDXL by method and number of concepts."""
    rows = table("docs/costs.md", "## FLOPs")[2:]
    numbers = {}
    for methods, concepts, *_, sd, xl in rows:
        for method in methods.split(", "):
            numbers[method, concepts] = float(sd.split(",")[0]), float(xl.split(",")[0])
    return numbers


COSTS = [
    ("README.md", r"SD 1.5 and SDXL ([\d.]+) times the FLOPs of a plain image", ("draft", "2"), 0),
    ("README.md", r"of a plain image, or ([\d.]+) times with a box", ("regional", "2"), 0),
    ("README.md", r"nothing is drafted \| ([\d.]+); with boxes", ("draft", "2"), 0),
    ("README.md", r"; with boxes ([\d.]+) \|", ("regional", "2"), 0),
    ("README.md", r"\| ([\d.]+); SDXL", ("lora-composer", "2"), 0),
    ("README.md", r"SDXL ([\d.]+) \|", ("lora-composer", "2"), 1),
    ("README.md", r"each LoRA acts in its box \| ([\d.]+) \|", ("regional", "2"), 0),
    ("docs/costs.md", r"`draft` ([\d.]+) times as many", ("draft", "2"), 0),
    ("docs/costs.md", r"`lora-composer` needs ([\d.]+) times", ("lora-composer", "2"), 0),
    ("docs/costs.md", r"`clora` ([\d.]+) times the FLOPs", ("clora", "2"), 0),
    ("docs/tutorial.md", r"about \[([\d.]+) times the FLOPs\]", ("lora-composer", "2"), 1),
    ("docs/faq.md", r"multiply: `draft` ([\d.]+) on SDXL", ("draft", "2"), 1),
    ("docs/faq.md", r"`lora-composer` ([\d.]+) and", ("lora-composer", "2"), 1),
    ("docs/faq.md", r"`clora` ([\d.]+) on SDXL", ("clora", "2"), 1),
    ("docs/faq.md", r"Cost grows with `lora-composer` \(([\d.]+) times", ("lora-composer", "8"), 0),
    ("docs/faq.md", r"hardly with `regional` \(([\d.]+)\)", ("regional", "8"), 0),
    ("docs/coming-from.md", r"It costs ([\d.]+) plain images", ("draft", "2"), 0),
    ("docs/coming-from.md", r"`freefuse` ([\d.]+) on SD 1.5", ("freefuse", "2"), 0),
    ("docs/coming-from.md", r"Here it costs ([\d.]+) of a plain image", ("merge", "1 to 8"), 0),
]


@pytest.mark.parametrize(("page", "sentence", "row", "model"), COSTS)
def test_costs_in_sentences_are_those_of_the_table(page, sentence, row, model):
    found = re.search(sentence, text_of(page))
    assert found is not None, sentence
    digits = len(found[1].partition(".")[2])
    assert f"{flops()[row][model]:.{digits}f}" == found[1] or abs(
        flops()[row][model] - float(found[1])
    ) <= 5.1 * 10 ** -(digits + 1)


def test_memory_on_the_first_screen_is_that_of_the_table():
    said = re.search(r"SDXL takes ([\d.]+) GiB in half precision, or ([\d.]+) with offloading", text_of("README.md"))
    assert said is not None
    assert [*said.groups()] == rows_of("README.md", "## Hardware")["SDXL"][:2]


def successes(page: str, after: str, column: int = 1) -> dict[str, float]:
    """A column of shares by row; the first number of a cell counts."""
    rows = table(page, after)[2:]
    return {row[0]: float(number[0]) for row in rows if (number := re.match(r"[\d.]+", row[column]))}


def test_shares_of_the_overview_of_methods_are_those_of_the_full_suite():
    full = successes("docs/methods/draft.md", "**`playground-full`**")
    for name, (said, *_) in rows_of("docs/methods/README.md", "## What to expect").items():
        method = "alone" if "alone" in name else re.split("[,:]", name)[0]
        assert said == f"{full[method]:.0%}".replace("%", " %"), name


def test_shares_of_the_held_back_scenes_are_those_of_their_tables():
    unet, transformer = (
        successes("docs/methods/draft.md", f"**`{suite}`**") for suite in ("playground-draft", "playground-flux-draft")
    )
    expected = [unet["draft"], unet["alone"], unet["clora"], unet["merge"], transformer["draft"]]
    said = re.search(r"In scenes and seeds that chose nothing.*?\[results\]", text_of("docs/methods/README.md"))
    assert said is not None
    assert re.findall(r"(\d+) %", said[0]) == [f"{100 * share:.0f}" for share in expected]


@pytest.mark.parametrize("page", ["docs/limits.md", "docs/faq.md"])
def test_the_shares_of_three_subjects_are_those_of_the_tables(page):
    said = (
        r"`draft` (?:gets three in )?{0}, and in held-back scenes(?: in)? {0} on a square canvas and {0} on a wide one"
    )
    found = re.search(said.format(r"([\d.]+)"), text_of(page))
    assert found is not None
    tables = {"**`playground-full`**": 5, "**Three on a square canvas**": 1, "**`playground-draft`**": 5}
    assert [float(number) for number in found.groups()] == [
        successes("docs/methods/draft.md", heading, column)["draft"] for heading, column in tables.items()
    ]


@pytest.mark.parametrize("page", ["docs/limits.md", "docs/faq.md"])
def test_shares_of_three_and_of_two_subjects_are_those_of_the_full_suite(page):
    said, suite = (re.findall(r"0\.\d\d to 0\.\d\d", text_of(text)) for text in (page, "docs/evaluation.md"))
    assert said == suite


def test_what_is_said_of_the_full_suite_is_in_its_table():
    full = successes("docs/evaluation.md", "## Results of the full suite")
    regional = re.search(r"the success is ([\d.]+) without and ([\d.]+) with it", text_of("docs/methods/regional.md"))
    assert regional is not None
    assert [float(number) for number in regional.groups()] == [full["regional"], full["regional, token masks"]]


def test_costs_of_adapters_beside_ours_are_those_of_the_table():
    (row,) = (row for row in table("docs/costs.md", "## Next to PEFT") if row[0] == "PEFT's set_adapters")
    said = re.search(
        r"PEFT's `set_adapters` \| no \| no \| no \| ([\d.]+) to ([\d.]+) \|", text_of("docs/coming-from.md")
    )
    assert said is not None
    assert [*said.groups()] == [row[1], row[5]]
