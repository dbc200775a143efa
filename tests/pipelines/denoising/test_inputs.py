"""Further arguments of a forward pass: what they lie on is marked, not guessed from their shape."""

import pytest
import torch

from lora_compose.pipelines.control.prepared import View
from lora_compose.pipelines.denoising.inputs import ByImage, OnGrid, check_marked, for_rows, of_images

CELLS = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
PART = View((slice(1, 3), slice(0, 2)))


def test_only_what_lies_on_the_grid_is_cut_to_a_part_of_the_canvas():
    found = for_rows({"grid": OnGrid(CELLS), "image": ByImage(CELLS), "scale": 0.5}, PART, 2)
    assert torch.equal(found["grid"], CELLS[..., 1:3, 0:2])
    assert torch.equal(found["image"], CELLS)
    assert found["scale"] == 0.5


def test_values_of_images_are_repeated_for_all_rows_and_cut_to_one_image():
    given = {"each": ByImage(torch.tensor([1, 2])), "one": ByImage(torch.tensor([3]))}
    assert {name: one.tolist() for name, one in for_rows(given, View(), 4).items()} == {
        "each": [1, 2, 1, 2], "one": [3, 3, 3, 3],
    }  # fmt: skip
    assert for_rows(given, View(image=1), 2)["each"].tolist() == [2, 2]
    assert for_rows(of_images(given, [1]), View(), 1)["each"].tolist() == [2]
    assert for_rows(of_images(given, [1]), View(), 1)["one"].tolist() == [3]


def test_a_tensor_without_a_mark_is_refused():
    with pytest.raises(TypeError, match="'guidance' is a tensor; expected ByImage or OnGrid"):
        check_marked({"kwargs": None, "guidance": torch.ones(2)})
