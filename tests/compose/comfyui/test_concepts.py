"""What people give in the nodes becomes gates, or an error that says what to do."""

from pathlib import Path

import pytest
import torch

from lora_compose.attention import Site
from lora_compose.compose.comfyui.concepts import Concept, boxes_of, composition_of, drawn, with_boxes
from lora_compose.compose.comfyui.words import METHODS
from lora_compose.compose.page.labels import METHOD_LABELS

CAT, DOG = Path("cat.safetensors"), Path("dog.safetensors")
SITES = {"a": Site("text"), "b": Site("image"), "c": Site("image", level=1), "d": Site("row"), "e": Site("modulation")}


def two(first: str = "", second: str = "") -> list[Concept]:
    return [Concept.of(CAT, "sks", "cat", 1.0, first), Concept.of(DOG, "zwx", "dog", 0.5, second)]


def test_the_methods_are_described_as_on_the_page() -> None:
    assert {name: METHOD_LABELS[name].sentence for name in METHODS} == METHODS


def test_regional_acts_in_boxes_on_our_rows_alone() -> None:
    plan = composition_of(two("0,0,0.5,1"), [{}, {}], None, "a sks cat", "regional")
    gates = plan.gates(SITES, [True, False], (2, 4), 7)
    assert gates.text.tolist() == [[[1.0, 0.5]] * 7, [[0.0, 0.0]] * 7]
    assert gates.image[0][0].tolist() == [[1, 0.5], [1, 0.5], [0, 0.5], [0, 0.5]] * 2
    assert gates.image[1].tolist() == [[[1, 0.5], [0, 0.5]], [[0, 0], [0, 0]]]
    assert gates.row.tolist() == [[1, 0.5], [0, 0]]
    assert gates.modulation is not None
    assert gates.modulation.tolist() == [[0, 0.5], [0, 0]], "a region has no part in what scales all cells alike"


def test_merge_acts_on_every_row() -> None:
    plan = composition_of(two(), [{}, {}], None, "", "merge")
    gates = plan.gates(SITES, [False, True], (2, 4), 7)
    assert torch.equal(gates.text, torch.tensor([1, 0.5]).expand(2, 7, 2))
    assert all(torch.equal(gate, torch.tensor([1, 0.5]).expand(2, 1, 2)) for gate in gates.image.values())


def test_a_small_box_does_not_vanish_on_a_coarse_grid() -> None:
    plan = composition_of(two("0.1,0.1,0.11,0.11"), [{}, {}], None, "", "regional")
    assert plan.gates(SITES, [True], (4, 4), 1).image[1][0, :, 0].tolist() == [1, 0, 0, 0]


def test_boxes_are_given_to_concepts_in_their_order() -> None:
    placed = with_boxes(two(), boxes_of("0,0,0.5,1\n\nnone\n"))
    assert [concept.region for concept in placed] == [(0, 0, 500, 1000), None]
    assert drawn(placed).mean(dim=(1, 2)).tolist() == [0.5, 1]


@pytest.mark.parametrize("box", ["0,0,1", "0,0,0,1", "0.5,0,0.2,1", "0,0,2,1", "a,b,c,d", "nan,0,1,1", "inf,0,1,1"])
def test_a_box_that_is_none_is_refused(box: str) -> None:
    with pytest.raises(ValueError, match=r"for example 0,0\.1,0\.5,0\.9"):
        Concept.of(CAT, "", "", 1.0, box)


@pytest.mark.parametrize(
    ("concepts", "method", "said"),
    [
        (two(), "regional", "give at least one a box or a mask"),
        (two("0,0,1,1"), "merge", "merge does not use boxes and masks"),
        ([Concept.of(CAT, "", "cat", 1.0)], "tara", "needs a trigger for cat.safetensors"),
    ],
)
def test_what_a_method_needs_is_said(concepts: list[Concept], method: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        composition_of(concepts, [{}] * len(concepts), None, "a cat", method)


def test_regions_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="has a box and a mask"):
        Concept.of(CAT, "", "", 1.0, "0,0,1,1", torch.ones(1, 4, 4))
    with pytest.raises(ValueError, match="is empty"):
        Concept.of(CAT, "", "", 1.0, "", torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match="clear it there"):
        with_boxes(two("0,0,1,1"), [None, None])
    with pytest.raises(ValueError, match="1 boxes for 2 concepts"):
        with_boxes(two(), [None])
