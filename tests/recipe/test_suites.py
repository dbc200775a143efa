"""Suites and scenes of the small world are such that `lora-compose` reads them, and name what the world has."""

from pathlib import Path

import pytest
import yaml

from lora_compose.compose.evaluation.suite import Suite as ReadSuite
from lora_compose.compose.files.scenes import read_scene
from lora_compose.compose.playground.assets import assets_dir
from recipe.suites import SCENES, SUITES, SceneFile, Suite
from recipe.tokenizer import known_words
from recipe.world import CHARACTERS, SIZE

HELD_BACK = (
    "playground-draft", "playground-draft-ancestral", "playground-threes", "playground-flux-draft",
    "playground-flux-8-steps", "playground-flux-4-steps",
)  # fmt: skip
"""Suites of what was chosen in others."""


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.name)
def test_a_suite_is_read_and_its_words_and_boxes_are_of_the_world(suite: Suite) -> None:
    read = ReadSuite.model_validate(yaml.safe_load(suite.text()))
    assert {concept.name for concept in read.concepts} == {
        name for scene in read.scenes for name in (*scene.concepts, *scene.bundle)
    }
    for scene in read.scenes:
        assert set(scene.prompt.replace(",", "").split()) <= set(known_words())
        width, height = scene.width or SIZE, scene.height or SIZE
        for box in scene.regions.values():
            assert isinstance(box, tuple)
            left, top, right, bottom = box
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height


@pytest.mark.parametrize("name", ["playground-quick", "playground-full", "playground-alone", "playground-flux"])
def test_every_character_is_in_the_suites_that_speak_of_all(name: str) -> None:
    suite = next(one for one in SUITES if one.name == name)
    assert {each for scene in suite.scenes for each in scene.concepts} == set(CHARACTERS)


def test_held_back_scenes_are_in_no_other_suite() -> None:
    prompts = {one.name: {scene.prompt for scene in one.scenes} for one in SUITES}
    held_back, others = (
        set().union(*(found for name, found in prompts.items() if (name in HELD_BACK) == held))
        for held in (True, False)
    )
    assert held_back
    assert not held_back & others


def test_shipped_suites_and_scenes_are_those_of_the_recipe() -> None:
    for folder, files in (("suites", SUITES), ("scenes", SCENES)):
        for file in files:
            assert (assets_dir() / folder / f"{file.name}.yaml").read_text("utf-8") == file.text(), file.name


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.name)
def test_a_scene_is_read_with_its_prompt_and_boxes(scene: SceneFile, tmp_path: Path) -> None:
    path = tmp_path / "scene.yaml"
    path.write_text(scene.text(), "utf-8")
    read = read_scene(path)
    assert read.prompt == scene.place.prompt
    assert [concept.name for concept in read.concepts] == scene.place.concepts
    assert [concept.region for concept in read.concepts] == (list(scene.place.boxes) or [None] * len(read.concepts))
