"""Without a method one is chosen, and the log says why."""

from dataclasses import replace

import pytest
import torch

from composing import BOXED, latents_of
from lora_compose.pipelines.methods import Draft, Merge, choose_method
from lora_compose.pipelines.scene import Concept


def test_without_a_method_the_choice_is_logged_with_its_reason(composer, caplog):
    caplog.set_level("INFO", "lora_compose.pipelines.methods")
    assert torch.equal(latents_of(composer, method=None), latents_of(composer, method="tara"))
    assert "method: tara, because every concept" in caplog.text
    caplog.clear()
    concepts = [Concept(name="cat", trigger=""), "dog"]
    chosen = latents_of(composer, method=None, concepts=concepts)
    assert torch.equal(chosen, latents_of(composer, method=Merge(), concepts=concepts))
    assert "method: merge, because cat is not named by trigger and class word" in caplog.text


def test_ordinary_loras_without_regions_are_told_apart_by_their_words(composer, caplog):
    caplog.set_level("INFO", "lora_compose.pipelines.methods")
    ordinary = [Concept(name=f"{name}-plain", lora=composer.concepts[name].lora, trigger=trigger, class_word=name)
                for name, trigger in (("cat", "sks"), ("dog", "zwx"))]  # fmt: skip
    loaded = [replace(concept, file=None) for concept in composer.resolve_concepts(ordinary)]
    assert isinstance(choose_method(loaded, ["a sks cat, a zwx dog"]), Draft)
    assert "method: draft, because the prompt names every concept" in caplog.text
    assert isinstance(choose_method(loaded, ["a sks, a zwx dog"]), Merge)
    assert "merge, because cat-plain is not named by trigger and class word" in caplog.text


@pytest.mark.parametrize("method", ["merge", "tara", "regional"])
def test_methods_with_one_text_say_that_own_prompts_are_not_read(composer, caplog, method):
    cat = Concept(name="cat", region=(0, 0, 64, 128), negative_prompt="blurry")
    latents_of(composer, method=method, concepts=[cat, "dog"])
    said = [record.getMessage() for record in caplog.records if "own prompts" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("the own prompts of cat are not read")
    caplog.clear()
    latents_of(composer, method="lora-composer", concepts=[cat, "dog"])
    assert "own prompts" not in caplog.text


def test_with_a_region_for_every_concept_the_choice_depends_on_words(composer, caplog):
    caplog.set_level("INFO", "lora_compose.pipelines.methods")
    assert torch.equal(
        latents_of(composer, method=None, concepts=BOXED), latents_of(composer, method="lora-composer", concepts=BOXED)
    )
    assert "method: lora-composer, because every concept has a region" in caplog.text
    nameless = [BOXED[0].model_copy(update={"trigger": ""}), BOXED[1]]
    chosen = latents_of(composer, method=None, concepts=nameless)
    assert torch.equal(chosen, latents_of(composer, method="regional", concepts=nameless))
    assert "method: regional, because every concept has a region, and not every one a trigger" in caplog.text
