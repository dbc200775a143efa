"""Concepts of a run are loaded with the words that the run gives them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from commands import call, flat
from components import random_lora, tiny_pipeline
from lora_compose import Concept
from lora_compose.compose.generate.making import load, make, plan
from lora_compose.compose.playground.assets import assets_dir
from lora_compose.pipelines.formats.files import read_lora
from lora_compose.pipelines.scene.scene import Run, Scene

pytestmark = pytest.mark.usefixtures("playgrounds_opened_once")
TAGS = {"ss_tag_frequency": json.dumps({"10_images": {"1girl": 40, "mikudress": 40}})}


@pytest.fixture
def pipe(write_lora: Callable[..., Path]) -> Any:
    pipe = tiny_pipeline()
    pipe.miku = str(write_lora("miku", unet=random_lora(pipe.unet, 0), metadata=TAGS))
    pipe.man = str(write_lora("man", unet=random_lora(pipe.unet, 1), metadata={"trigger": "ohwx man"}))
    return pipe


@pytest.mark.parametrize("given", [{"trigger": "mikudress"}, {"role": "style"}])
def test_a_concept_with_its_words_is_loaded_without_a_warning(pipe: Any, caplog: Any, given: dict) -> None:
    found = load(pipe, Concept(name="miku", lora=pipe.miku, **given))
    assert (found.concept.trigger, found.concept.role) == (given.get("trigger"), given.get("role"))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_a_concept_without_a_trigger_is_named_with_candidates_once(pipe: Any, caplog: Any) -> None:
    for _ in range(2):
        load(pipe, Concept(name="miku", lora=pipe.miku))
    assert caplog.text.count("concept 'miku' has no trigger") == 1


def test_the_words_of_a_run_do_not_stay_for_the_next(pipe: Any, caplog: Any) -> None:
    caplog.set_level("INFO")
    own = load(pipe, Concept(name="man", lora=pipe.man, trigger="brt", class_word="boy", weight=0.5))
    assert (own.concept.phrase, own.concept.weight) == ("brt boy", 0.5)
    assert "from its file" not in caplog.text
    again = load(pipe, Concept(name="man", lora=pipe.man))
    assert (again.concept.phrase, again.concept.weight) == ("ohwx man", 1.0)


@pytest.mark.usefixtures("costs_do_not_matter")
def test_check_does_not_ask_for_a_trigger_that_was_typed(tmp_path: Path) -> None:
    file = read_lora(assets_dir() / "playground" / "loras" / "cat.safetensors")
    save_file(dict(file.tensors), tmp_path / "miku.safetensors", TAGS)
    typed = "playground", "--prompt", "a mikudress cat", "--device", "cpu", "--method", "merge", "--concept"
    path = f"path={tmp_path / 'miku.safetensors'}"
    assert "has no trigger" in flat(call("check", *typed, path).output)
    assert "has no trigger" not in flat(call("check", *typed, f"{path},trigger=mikudress").output)


def test_a_run_without_a_method_is_chosen_for_once_with_the_same_reason_everywhere(pipe: Any, caplog: Any) -> None:
    caplog.set_level("INFO")
    miku = Concept(name="miku", lora=pipe.miku, trigger="mikudress", class_word="girl")
    man = Concept(name="man", lora=pipe.man, class_word="person")
    scene = Scene(prompt="a mikudress girl and a ohwx man person", concepts=(miku, man), width=64, height=64)
    run = Run(model="tiny", scene=scene, steps=2, dtype="float32")
    reason = "the prompt names every concept by trigger and class word"
    planned = plan(pipe, run)
    assert planned is not None
    assert (planned.method, planned.choice.reason) == ("draft", reason)
    caplog.clear()
    record = make(pipe, run).record
    assert (record.run.method, record.method_reason) == ("draft", reason)
    assert caplog.text.count("method: draft, because") == 1
    named = make(pipe, run.model_copy(update={"method": "switch", "settings": {"interval": 1}})).record
    assert (named.run.method, dict(named.run.settings), named.method_reason) == ("switch", {"interval": 1}, None)
