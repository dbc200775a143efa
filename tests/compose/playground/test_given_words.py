"""Two women of one class word from files that say nothing of their words: what is typed is what counts."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from lora_compose import ComposePipeline, Concept
from lora_compose.compose.playground.assets import playground_lora, playground_model
from small_world import words

WOMEN = {"mira": "brown hair", "lena": "black hair"}
"""Concepts, and what is typed after their word."""


@pytest.fixture(scope="module")
def pipe() -> Any:
    return ComposePipeline.from_pretrained(playground_model())


def triggers() -> dict[str, str]:
    return {name: f"{words(name)[0]} {described}" for name, described in WOMEN.items()}


def test_triggers_of_three_words_are_found_and_the_method_is_draft(pipe: Any, tmp_path: Path) -> None:
    given = []
    for name, trigger in triggers().items():
        bare = tmp_path / f"{name}.safetensors"
        save_file(load_file(playground_lora(name)), bare)  # without metadata
        given.append(Concept(name=name, lora=str(bare), trigger=trigger, class_word="woman"))
    one, other = triggers().values()
    plan = pipe.plan(f"a {one} woman and a {other} woman in a room", concepts=given)
    assert plan.method == "draft"
    assert [planned.trigger[0] for planned in plan.concepts] == [(2, 3, 4), (8, 9, 10)]
    assert [planned.phrase[0] for planned in plan.concepts] == [(2, 3, 4, 5), (8, 9, 10, 11)]
    assert not plan.warnings


def test_without_any_word_it_is_said_which_are_missing(pipe: Any, tmp_path: Path) -> None:
    bare = tmp_path / "mira.safetensors"
    save_file(load_file(playground_lora("mira")), bare)
    mira, dog = (Concept(name=path.stem, lora=str(path)) for path in (bare, playground_lora("dog")))
    plan = pipe.plan("a woman and a zwx dog", concepts=[mira, dog])
    assert plan.method == "merge"
    assert "mira has no trigger" in plan.choice.reason


def test_given_words_win_over_those_of_the_file(pipe: Any) -> None:
    """So the playground's own files give the image that files without metadata give."""
    trigger = triggers()["mira"]
    mira = Concept(name="mira", lora=str(playground_lora("mira")), trigger=trigger, class_word="woman")
    (loaded,) = pipe.resolve_concepts([mira])
    assert loaded.concept.phrase == f"{trigger} woman"
