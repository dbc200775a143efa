"""Which concepts act in a call: by name, by file, with fields of their own."""

import json
from inspect import signature

import pytest
import torch

from components import State
from composing import BOXED, ONE_PASS, PROMPT, assert_close, compose, far_apart, latents_of, lora_file
from lora_compose.pipelines.concepts.loading import LoraError
from lora_compose.pipelines.scene.scene import Concept
from pairs import slow_but


def test_what_is_given_in_a_call_wins_over_what_is_loaded(composer):
    lighter = latents_of(composer, concepts=[Concept(name="cat", weight=0.5), "dog"])
    assert far_apart(lighter, latents_of(composer))
    assert composer.concepts["cat"].weight == 1.0
    (found,) = composer.resolve_concepts([Concept(name="cat", trigger="xlo", region=(0, 0, 8, 8))])
    expected = composer.concepts["cat"].model_copy(update={"trigger": "xlo", "region": (0, 0, 8, 8)})
    assert found.concept == expected


@pytest.mark.parametrize("method", ONE_PASS)
def test_the_order_of_concepts_does_not_matter(composer, method):
    assert_close(latents_of(composer, method=method, concepts=["dog", "cat"]), latents_of(composer, method=method))


@pytest.mark.parametrize("method", slow_but(["tara"], ONE_PASS))
def test_a_concept_of_weight_0_is_as_good_as_absent(composer, method):
    absent = latents_of(composer, method=method, concepts=["cat"])
    assert_close(latents_of(composer, method=method, concepts=["cat", Concept(name="dog", weight=0.0)]), absent)
    nothing = latents_of(composer, method=method, concepts=[Concept(name="cat", weight=0.0)])
    assert_close(nothing, latents_of(composer, concepts=None, method=None))


def test_weights_may_be_given_by_name(composer):
    weights = {"cat": 1.0, "dog": "1..0.5"}
    expected = latents_of(composer, concepts=[Concept(name=name, weight=weight) for name, weight in weights.items()])
    assert torch.equal(latents_of(composer, concepts=weights), expected)
    assert far_apart(expected, latents_of(composer))
    prompts = ["a sks cat", "a zwx dog"]
    sets = latents_of(composer, prompt=prompts, concepts=[{"cat": 0.5}, {"dog": 1.0}])
    by_list = latents_of(composer, prompt=prompts, concepts=[[Concept(name="cat", weight=0.5)], ["dog"]])
    assert torch.equal(sets, by_list)
    assert torch.equal(latents_of(composer, concepts={}, method=None), latents_of(composer, concepts=None, method=None))


def test_concepts_may_be_plain_json(composer):
    boxes = {"cat": [0, 0, 64, 128], "dog": [64, 0, 128, 128]}
    fields = {name: {"weight": [1, 0.5], "region": box} for name, box in boxes.items()}
    listed = [{"name": name, **given} for name, given in fields.items()]
    expected = latents_of(composer, method="regional", concepts=[Concept(**given) for given in listed])
    for given in (fields, listed):
        read = json.loads(json.dumps(given))
        assert torch.equal(latents_of(composer, method="regional", concepts=read), expected)
    prompts, half = ["a sks cat", "a zwx dog"], {"name": "cat", "weight": 0.5}
    sets = latents_of(composer, prompt=prompts, concepts=[[half], {"dog": {}}])
    assert torch.equal(sets, latents_of(composer, prompt=prompts, concepts=[[Concept(**half)], ["dog"]]))
    tagged = latents_of(composer, prompt=f"{PROMPT} <lora:dog:0.5>", concepts=[half])
    assert torch.equal(tagged, latents_of(composer, concepts=[half, Concept(name="dog", weight=0.5)]))


def test_a_box_by_name_is_the_region(composer):
    boxes = {"cat": (0, 0, 64, 128), "dog": "64,0,128,128"}
    expected = latents_of(composer, concepts=BOXED, method="regional")
    assert torch.equal(latents_of(composer, concepts=boxes, method="regional"), expected)
    assert far_apart(latents_of(composer, method="regional", concepts=boxes | {"cat": (0, 0, 32, 128)}), expected)


def test_a_box_by_name_is_the_region_beside_a_tag(composer):
    boxed = [BOXED[0], Concept(name="dog", weight=0.5, region=None)]
    tagged = latents_of(composer, prompt=f"{PROMPT} <lora:dog:0.5>", concepts={"cat": (0, 0, 64, 128)})
    assert torch.equal(tagged, latents_of(composer, concepts=boxed))


@pytest.mark.parametrize(
    ("given", "box"),
    [
        ((0, 0.2, 0.5, 1.0), (0, 0.2, 0.5, 1.0)),
        ([0.0, 0.0, 1.0, 1.0], (0.0, 0.0, 1.0, 1.0)),
        ((0, 0, 8, 8), (0, 0, 8, 8)),
        ("0, 0, 0.5, 1", (0, 0, 0.5, 1)),
        ((0.5, 0, 0.5, 1), (0.5, 0, 1.0, 1)),  # with width and height
        ([0.0, 0.3, 0.7, 0.1], (0.0, 0.3, 0.7, 0.4)),
    ],
)
def test_four_numbers_that_may_be_a_box_and_may_be_weights_are_refused_with_what_to_write(composer, given, box):
    with pytest.raises(ValueError, match=r"may be .*box, or the weights") as error:
        compose(composer, concepts={"cat": given, "dog": 1.0})
    written = str(error.value).partition("; write ")[2].split(" or ")
    region, weights = (eval(one, {"Concept": Concept}) for one in written)
    assert region == Concept(name="cat", region=box)
    assert weights == Concept(name="cat", weight=given)


@pytest.mark.parametrize(
    "weights",
    [[1, 0.8, 0.4, 0], (1.0, 1.0, 0.0, 0.0), [0, 0.5, 1], [0, 0.5, 1.2, 1], [0, 0.8, 0.4, 0.8], "1,0.8,0.4,0", "1..0"],
)
def test_other_lists_by_name_are_weights_for_parts_of_the_steps(composer, weights):
    listed, named = [Concept(name="cat", weight=weights), "dog"], {"cat": weights, "dog": 1.0}
    plans = [composer.plan(PROMPT, concepts=concepts, method="merge") for concepts in (listed, named)]
    assert plans[0].concepts == plans[1].concepts
    assert plans[0].concepts[0].concept.weight == Concept(name="cat", weight=weights).weight


@pytest.mark.parametrize(
    "concepts", [{"cat": 30, "dog": 1}, {"cat": (64, 0, 0, 128)}, {"cat": "0:1,0.5:-80"}, {"cat": [1, 11]}]
)
def test_weights_that_are_probably_a_mistake_are_refused(composer, concepts):
    with pytest.raises(ValueError, match=r"the weight reaches \d+; beyond 10 and -10 images are noise"):
        compose(composer, concepts=concepts)
    with pytest.raises(ValueError, match="the weight reaches 80"):
        compose(composer, concepts=["cat"], prompt=f"{PROMPT} <lora:dog:80>")


def test_weights_that_are_asked_for_are_taken(composer):
    strong = Concept(name="cat", weight=12, any_weight=True)
    found = latents_of(composer, concepts=[strong, "dog"])
    assert far_apart(found, latents_of(composer, concepts={"cat": 10, "dog": 1}))
    composer.load_concept(lora_file("sd", "cat"), "strong", weight=12, any_weight=True, trigger="sks")
    assert torch.equal(latents_of(composer, concepts=["strong", "dog"]), found)
    composer.unload_concept("strong")
    with pytest.raises(ValueError, match="any_weight=True allows it"):
        composer.load_concept(lora_file("sd", "cat"), "strong", weight=12)


def test_every_field_of_a_concept_can_be_given_when_it_is_loaded(composer):
    path = composer.concepts["cat"].lora
    given = {
        "trigger": "xlo", "class_word": "lion", "weight": 0.5, "blocks": {"down": 0.5}, "region": (0, 0, 8, 8),
        "prompt": "a xlo lion", "negative_prompt": "dark", "role": "subject", "references": True,
    }  # fmt: skip
    loaded = composer.load_concept(path, "lion", **given)
    assert {name: value for name, value in given.items() if getattr(loaded, name) != value} == {}
    parameters = signature(composer.load_concept).parameters
    assert set(Concept.model_fields) - {"lora"} <= set(parameters)


@pytest.mark.parametrize(
    ("typo", "meant"), [({"triger": "sks"}, "trigger"), ({"clas_word": "cat"}, "class_word"), ({"tokn": "x"}, "token")]
)
def test_mistyped_arguments_of_load_concept_are_refused(composer, typo, meant):
    before = State(composer)
    with pytest.raises(TypeError, match=f"load_concept has no argument '{next(iter(typo))}'; did you mean .*'{meant}'"):
        composer.load_concept(composer.concepts["cat"].lora, "other", **typo)
    before.assert_unchanged()


def test_a_file_can_be_named_in_the_call_alone(pipe, composer):
    path = composer.concepts["cat"].lora
    composer.unload_concept("cat")
    given = latents_of(composer, prompt="a sks cat", concepts=[Concept(name="cat", lora=path)])
    assert "cat" not in composer.concepts
    composer.load_concept(path, "tom")
    assert torch.equal(given, latents_of(composer, prompt="a sks cat", concepts=["tom"]))


def test_names_are_given_once(composer, write_lora):
    path = composer.concepts["dog"].lora
    with pytest.raises(ValueError, match="a concept or adapter 'cat' already"):
        composer.load_concept(path, "cat")
    composer.load_lora_weights(path, adapter_name="style")
    with pytest.raises(ValueError, match="a concept or adapter 'style' already"):
        composer.load_concept(path, "style")
    assert list(composer.concepts) == ["cat", "dog"]


def test_unloaded_concepts_are_forgotten_and_can_be_loaded_again(composer):
    path = composer.concepts["cat"].lora
    expected = latents_of(composer)
    composer.unload_concept("cat")
    assert list(composer.concepts) == ["dog"]
    with pytest.raises(ValueError, match=r"unknown concept 'cat'; loaded are dog\. Load it with load_concept"):
        compose(composer)
    with pytest.raises(ValueError, match="no concept 'cat' is loaded; there are dog"):
        composer.unload_concept("cat")
    composer.load_concept(path, "cat")
    assert torch.equal(latents_of(composer), expected)


def test_the_concepts_cannot_be_changed_from_outside(composer):
    composer.concepts.pop("cat")
    assert list(composer.concepts) == ["cat", "dog"]


def test_a_file_that_cannot_be_used_leaves_the_pipeline_as_it_was(composer, write_lora, tmp_path):
    before = State(composer)
    (tmp_path / "broken.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(LoraError, match=r"broken\.safetensors is no.* readable safetensors file"):
        composer.load_concept(tmp_path / "broken.safetensors")
    with pytest.raises(LoraError, match="there is no file"):
        composer.load_concept(tmp_path / "missing.safetensors")
    assert list(composer.concepts) == ["cat", "dog"]
    before.assert_unchanged()


def test_auto_takes_the_concepts_that_the_prompts_name(composer):
    cat = latents_of(composer, prompt="a sks cat", concepts=["cat"])
    assert torch.equal(latents_of(composer, prompt="a sks cat", concepts="auto"), cat)
    assert torch.equal(latents_of(composer, prompt="a cat", concepts="auto"), cat), "its trigger is written"
    prompts = ["a sks cat", "a zwx dog"]
    one_by_one = latents_of(composer, prompt=prompts, concepts=[["cat"], ["dog"]], method="merge")
    assert torch.equal(latents_of(composer, prompt=prompts, concepts="auto", method="merge"), one_by_one)


def test_auto_says_what_it_did_not_take(composer, caplog):
    composer.load_concept(composer.concepts["cat"].lora, "tom", trigger="tmm", class_word="cat")
    with caplog.at_level("INFO", "lora_compose.pipelines"):
        latents_of(composer, prompt="a zwx dog and a cat", concepts="auto")
    said = [record.getMessage() for record in caplog.records if record.name.endswith(("loader_mixin", "notes"))]
    assert said[0] == "concepts: dog: by its trigger 'zwx'"
    assert "'cat' may be cat ('sks cat'), tom ('tmm cat')" in said[1]


@pytest.mark.parametrize(
    ("prompt", "message"), [("a house", "the prompt names no concept; there are cat"), ("", "reads the prompt")]
)
def test_auto_without_a_name_is_refused(composer, prompt, message):
    with pytest.raises(ValueError, match=message):
        latents_of(composer, prompt=prompt, concepts="auto")
