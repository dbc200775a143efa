"""Kinds of failure, from scores that are known by hand, and the sheet of examples."""

from pathlib import Path

import pytest
from PIL import Image

from commands import call
from evaluations import known, store, suite
from lora_compose.compose.evaluation.failures import kinds_of_failure
from lora_compose.compose.evaluation.table import load


@pytest.mark.parametrize(
    ("method", "failures"),
    [("merge", ["mixed", "missing"]), ("regional", ["", "weak"]), ("tara", ["", "missing"]), ("alone", [""] * 4)],
)
def test_an_image_fails_in_the_first_way_that_one_of_its_subjects_does(tmp_path, method, failures) -> None:
    images = kinds_of_failure(load(store(tmp_path, suite(), known)), method)
    assert images["failure"].tolist() == failures
    assert [not failure for failure in failures] == images["success"].tolist()
    assert set(images["kind"]) == {"2 subjects"}


def test_scenes_are_told_apart_by_the_number_of_subjects_and_by_class(tmp_path) -> None:
    found = load(store(tmp_path, suite({"both": ("cat", "dog"), "one": ("dog",)}), known_of_all))
    assert kinds_of_failure(found, "merge")["kind"].tolist() == ["2 subjects"] * 2 + ["1 subject"] * 2
    concepts = [concept.model_copy(update={"class_word": "pet"}) for concept in suite().concepts]
    alike = suite().model_copy(update={"concepts": tuple(concepts)})
    assert set(kinds_of_failure(load(store(tmp_path / "alike", alike, known)), "merge")["kind"]) == {
        "2 subjects of one class"
    }


def test_a_bystander_that_is_missing_or_taken_is_a_failure_of_its_own(tmp_path) -> None:
    scene = {"name": "beside", "prompt": "a sks cat and a cat", "concepts": ["cat"], "bystanders": {"other": "cat"}}

    def measured(batch, seed):
        right = {1: {"cat": 0.3}, 2: {"cat": 0.7}, 3: {}, 4: {}}[seed] if batch.arm.method else {"cat": 0.2}
        cat = 0.2 if batch.arm.name == "no LoRA" else 0.8
        return {"cat": None if batch.arm.method and seed == 4 else cat, "other": right}

    folder = store(tmp_path, suite([scene], methods=["merge"], seeds=[1, 2, 3, 4]), measured)
    images = kinds_of_failure(load(folder), "merge")
    assert images["failure"].tolist() == ["", "bystander", "bystander", "missing"]
    assert set(images["kind"]) == {"2 subjects of one class, 1 without a LoRA"}
    assert kinds_of_failure(load(folder), "alone")["failure"].tolist() == [""] * 4


def known_of_all(batch, seed):
    found = known(batch, seed)
    return {name: found[name] for name in batch.scene.concepts if name in found}


def test_the_command_counts_failures_and_writes_a_sheet(tmp_path) -> None:
    folder: Path = store(tmp_path / "run", suite(), known, draw=True)
    result = call("evaluate", "failures", folder, "--method", "merge")
    rows = [line.replace("│", "").split() for line in result.output.splitlines() if "all" in line]
    assert rows[0][:6] == ["all", "2", "0.00", "0.50", "0.50", "0.00"]
    with Image.open(folder / "failures-merge.png") as image:
        assert image.height > image.width / 3
    assert "no images of 'clora'" in call("evaluate", "failures", folder, "--method", "clora", code=2).output
