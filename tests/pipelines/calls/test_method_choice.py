"""Without a method one is chosen, and the log names the reason."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from composing import BOXED, compose, latents_of
from lora_compose.pipelines.methods import Draft, Merge, Regional, Tara, choose_method
from lora_compose.pipelines.scene.scene import Concept
from pairs import slow_but


def ordinary(composer: Any, **changes: Any) -> list[Any]:
    """The cat and the dog, without the training method in their metadata."""
    concepts = [Concept(name=name, **{"class_word": name, **changes.get(name, {})}) for name in ("cat", "dog")]
    return [replace(concept, files=()) for concept in composer.resolve_concepts(concepts)]


def test_without_a_method_the_choice_is_logged_and_returned_with_its_reason(composer, caplog):
    caplog.set_level("INFO", "lora_compose.pipelines.methods")
    output = compose(composer, method=None, output_type="latent")
    reason = "the prompt names every concept by trigger and class word"
    assert (output.method, output.method_reason) == ("draft", reason)
    assert torch.equal(output.images, latents_of(composer, method="draft"))
    assert f"method: draft, because {reason}" in caplog.text
    asked_for = compose(composer, method=Merge())
    assert (asked_for.method, asked_for.method_reason) == ("merge", "it was asked for")


def test_a_blend_is_a_warning_that_says_what_is_missing(composer, caplog):
    concepts = [Concept(name="cat", trigger=""), "dog"]
    output = compose(composer, method=None, concepts=concepts, output_type="latent")
    assert output.method == "merge"
    assert torch.equal(output.images, latents_of(composer, method=Merge(), concepts=concepts))
    (said,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert said.getMessage().startswith("method: merge, because cat has no trigger: give it one")


def test_a_missing_trigger_is_refused_without_warnings_before(composer, caplog):
    heavy = [Concept(name=name, weight=4.0) for name in ("cat", "dog")]  # which warns as well
    with pytest.raises(ValueError, match="the trigger 'sks' of concept 'cat' is not in the prompt"):
        compose(composer, method=Merge(), concepts=heavy, prompt="a zwx dog and a cat")
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []


MISSING = {
    "the class word": ("a sks kitty and a zwx dog", {}, "the prompt has 'sks' without 'cat' after it: write 'sks cat'"),
    "the trigger": ("a cat and a zwx dog", {}, "the prompt lacks 'sks', the trigger of cat: write 'sks cat'"),
    "a class word of its own": ("a sks beside a zwx cat", {"dog": {"class_word": "cat"}},
        "the prompt has 'sks' without 'cat' after it: write 'sks cat'"),
    "any class word": ("a sks cat and a zwx dog", {"cat": {"class_word": ""}},
        "cat has no class word: give it one, Concept(name='cat', class_word='cat'), and write it after 'sks'"),
    "two class words": ("a sks and a zwx", {}, "write 'sks cat'; the prompt has 'zwx' without"),
    "a prompt": (None, {}, "prompt_embeds are given instead of a prompt"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISSING)
def test_what_draft_lacks_is_named_with_what_to_write(composer, caplog, case):
    prompt, changes, message = MISSING[case]
    choice = choose_method(ordinary(composer, **changes), None if prompt is None else [prompt])
    assert isinstance(choice.method, Merge)
    assert message in choice.reason
    (said,) = caplog.records
    assert said.levelname == "WARNING"
    assert message in said.getMessage()
    assert "subjects blend" in said.getMessage()


def test_loras_trained_with_token_masks_get_them_where_draft_lacks_a_word(composer, caplog):
    caplog.set_level("INFO", "lora_compose.pipelines.methods")
    trained = composer.resolve_concepts(["cat", "dog"])
    assert isinstance(choose_method(trained, ["a sks cat, a zwx dog"]).method, Draft)
    assert isinstance(choose_method(trained, ["a sks kitty, a zwx dog"]).method, Tara)
    assert "trained for it, and the prompt has 'sks' without 'cat' after it: write 'sks cat'" in caplog.text
    assert choose_method(trained[:1], ["a sks cat"]).reason == "every concept was trained for it"


def test_ordinary_loras_without_regions_are_distinguished_by_their_words(composer, caplog):
    caplog.set_level("INFO", "lora_compose.pipelines.methods")
    assert isinstance(choose_method(ordinary(composer), ["a sks cat, a zwx dog"]).method, Draft)
    assert "method: draft, because the prompt names every concept" in caplog.text


def test_one_subject_does_not_blend(composer, caplog):
    assert isinstance(choose_method(ordinary(composer)[:1], ["a sks kitty"]).method, Merge)
    assert not caplog.records


def test_a_region_of_one_of_several_concepts_is_used(composer, caplog):
    boxed = {"cat": {"region": (0, 0, 64, 128)}}
    choice = choose_method(ordinary(composer, **boxed), ["a sks cat, a zwx dog"])
    assert isinstance(choice.method, Draft)
    assert choice.reason == "cat has a region, and dog is looked for in the rest of the image"
    assert not caplog.records
    choice = choose_method(ordinary(composer, **boxed), ["a sks cat, a zwx"])
    assert isinstance(choice.method, Regional)
    assert choice.reason == "cat has a region, and the prompt has 'zwx' without 'dog' after it: write 'zwx dog'"
    assert "without a region, dog acts on the whole image, also inside the regions of others" in caplog.text


@pytest.mark.parametrize("method", slow_but(["regional"], ["merge", "tara", "regional"]))
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
    chosen = latents_of(composer, method=None, concepts=BOXED)
    assert torch.equal(chosen, latents_of(composer, method="draft", concepts=BOXED))
    every = "every concept has a region"
    assert f"method: draft, because {every}, and the prompt names each by trigger and class word" in caplog.text
    nameless = [BOXED[0].model_copy(update={"trigger": ""}), BOXED[1]]
    chosen = latents_of(composer, method=None, concepts=nameless)
    assert torch.equal(chosen, latents_of(composer, method="regional", concepts=nameless))
    assert f"method: regional, because {every}, and cat has no trigger: give it one" in caplog.text


def test_one_subject_with_a_region_acts_in_it(composer):
    boxed = ordinary(composer, cat={"region": (0, 0, 64, 128)})[:1]
    choice = choose_method(boxed, ["a sks cat"])
    assert isinstance(choice.method, Regional)
    assert choice.reason == "every concept has a region, and there is one subject"
    given: Any = {"concepts": BOXED[:1], "prompt": "a sks cat"}
    expected = latents_of(composer, method="regional", **given)
    assert torch.equal(latents_of(composer, method="draft", **given), expected)
    whole = latents_of(composer, method=Draft(keep_regions=False), **given)
    assert torch.equal(whole, latents_of(composer, method="merge", concepts=["cat"], prompt="a sks cat"))
