"""References that a LoRA makes alone: made once, cut to the subject."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lora_compose.compose.evaluation.alone import Alone, missing_references, with_references
from lora_compose.compose.evaluation.published import write_suite
from lora_compose.compose.evaluation.scoring import reference_files
from lora_compose.compose.evaluation.suite import Suite, read_suite
from lora_compose.compose.playground.assets import playground_model

pytestmark = pytest.mark.usefixtures("playgrounds_opened_once")
VOCABULARY = ("bear", "dog", "robot", "tree")
ALONE = Alone(prompt="a sks cat on grass", seeds=(7, 8))
SIDE = 64
SCENE: dict[str, Any] = {
    "name": "both", "prompt": "a sks cat and a zwx dog", "concepts": ["cat", "dog"], "width": SIDE, "height": SIDE,
}  # fmt: skip


def suite(**changes: Any) -> Suite:
    fields: dict[str, Any] = {
        "name": "small", "model": "playground", "encoder": "playground:judge", "methods": ["merge"], "seeds": [1],
        "steps": 1, "guidance_scale": 4, "threads": 1, "device": "cpu",
        "detector": {"kind": "windows", "vocabulary": VOCABULARY, "threshold": 0.0},
        "concepts": [
            {"name": "cat", "lora": "playground:cat", "trigger": "sks", "class_word": "cat", "references": "cat alone"},
            {"name": "dog", "lora": "playground:dog", "trigger": "zwx", "class_word": "dog",
             "references": "playground:dog"},
        ],
        "scenes": [SCENE],
    }  # fmt: skip
    return Suite.model_validate(fields | changes)


def test_a_lora_makes_its_references_once_and_they_are_cut_to_the_subject(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = with_references(suite(), {"cat alone": ALONE}, tmp_path)
    files = reference_files(ready.concept("cat"))
    assert [file.name for file in files] == ["7.png", "8.png"]
    assert ready.concept("dog") == suite().concept("dog")
    for file in files:
        with Image.open(file) as image:
            assert max(image.size) < SIDE
    assert list((tmp_path / "references").iterdir()) == [files[0].parent]

    def opened(*given: Any) -> None:
        raise AssertionError("the model is opened again")

    monkeypatch.setattr("lora_compose.compose.evaluation.alone.open_model", opened)
    other_methods = with_references(suite(methods=["tara"]), {"cat alone": ALONE}, tmp_path)
    assert other_methods.concepts == ready.concepts
    with pytest.raises(AssertionError, match="opened again"):
        with_references(suite(steps=2), {"cat alone": ALONE}, tmp_path)


def test_references_are_found_again_where_the_model_is_in_another_folder(tmp_path: Path) -> None:
    def small(name: str) -> Suite:
        regions = {"cat": [0, 0, 32, SIDE], "dog": [32, 0, SIDE, SIDE]}
        return suite(model=str(tmp_path / name), detector=None, scenes=[SCENE | {"regions": regions}])

    shutil.copytree(playground_model(), tmp_path / "here")
    assert missing_references(small("here"), {"cat alone": ALONE}, tmp_path) == {"cat": 2}
    made = with_references(small("here"), {"cat alone": ALONE}, tmp_path)
    (tmp_path / "here").rename(tmp_path / "there")
    assert missing_references(small("there"), {"cat alone": ALONE}, tmp_path) == {}
    assert with_references(small("there"), {"cat alone": ALONE}, tmp_path).concepts == made.concepts


def test_references_in_a_relative_folder_are_those_of_the_suite_that_is_written_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(suite: Suite, batches: Any, folders: Any) -> None:
        folders["cat"].mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folders["cat"] / "7.png")

    monkeypatch.setattr("lora_compose.compose.evaluation.alone._make", make)
    monkeypatch.chdir(tmp_path)
    out = Path("outputs/small")
    write_suite(with_references(suite(), {"cat alone": ALONE}, out), out / "suite.yaml")
    files = reference_files(read_suite(str(out / "suite.yaml")).concept("cat"))
    assert [file.name for file in files] == ["7.png"]


def test_a_subject_that_the_detector_does_not_find_has_no_references(tmp_path: Path) -> None:
    blind = suite(detector={"kind": "windows", "vocabulary": VOCABULARY, "threshold": 1.0})
    with pytest.raises(ValueError, match="cat: the detector found its class word in 0 of the images that its LoRA"):
        with_references(blind, {"cat alone": Alone(prompt=ALONE.prompt, seeds=(7,))}, tmp_path)
    assert not list(tmp_path.rglob("*.png"))
