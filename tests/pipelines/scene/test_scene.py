"""Concepts, scenes and runs are frozen and validated."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lora_compose.pipelines.scene.scene import Concept, Run, Scene, check_box, check_names, concepts_of
from lora_compose.pipelines.support.field_errors import FieldError

SCENE = Scene(prompt="a sks cat")

VALID: list[tuple[type, dict[str, Any]]] = [
    (Concept, {"name": "cat"}),
    (Scene, {"prompt": "a sks cat"}),
    (Run, {"scene": SCENE, "model": "playground"}),
]


@pytest.mark.parametrize(("kind", "fields"), VALID)
def test_fields_cannot_be_changed(kind, fields):
    made = kind(**fields)
    for name in kind.model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(made, name, None)
    assert made == kind(**fields)


@pytest.mark.parametrize(("kind", "fields"), VALID)
def test_unknown_fields_are_refused_by_name(kind, fields):
    with pytest.raises(FieldError, match=rf"^{kind.__name__}: promt: unknown field; fields are ") as caught:
        kind(**fields, promt="a sks cat")
    assert ("did you mean 'prompt'?" in str(caught.value)) == ("prompt" in kind.model_fields)


def test_concepts_of_a_scene_may_be_given_by_name() -> None:
    fields: dict[str, Any] = {"concepts": {"cat": {"lora": "cat.safetensors", "region": [0, 0, 64, 64]}, "dog": 0.5}}
    assert Scene(prompt="a sks cat", **fields).concepts == (
        Concept(name="cat", lora="cat.safetensors", region=(0, 0, 64, 64)), Concept(name="dog", weight=0.5),
    )  # fmt: skip


def test_errors_say_where_and_what_was_expected_and_do_not_repeat_the_prompt():
    prompt = "a sks cat " * 100
    fields: dict[str, Any] = {"concepts": [{"name": "cat", "weight": "much"}]}
    with pytest.raises(FieldError) as caught:
        Scene(prompt=prompt, width=-1, **fields)
    first, second = caught.value.messages
    assert first.startswith("concepts[0].weight: ")
    assert second == "width: expected greater than 0, found -1"
    assert "pydantic" not in str(caught.value)
    assert prompt not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


@pytest.mark.parametrize(("fields", "phrase"), [
    ({"trigger": "sks", "class_word": "cat"}, "sks cat"),
    ({"trigger": "sks"}, "sks"),
    ({"class_word": "cat"}, "cat"),
    ({}, ""),
])  # fmt: skip
def test_the_phrase_is_trigger_and_class_word(fields, phrase):
    assert Concept(name="cat", **fields).phrase == phrase


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf])
def test_weights_must_be_finite(weight):
    with pytest.raises(FieldError, match="finite number"):
        Concept(name="cat", weight=weight)
    with pytest.raises(FieldError, match="finite number"):
        Run(scene=SCENE, model="playground", guidance_scale=weight)


@pytest.mark.parametrize("region", [(0, 0, 64), (0, 0, 64, 64, 64), (0, 0, 0.5, 64), "left", (0, 0, math.inf, 64)])
def test_regions_are_four_whole_numbers(region):
    with pytest.raises(FieldError, match="region"):
        Concept(name="cat", region=region)


@given(st.tuples(*[st.integers(-20, 200)] * 4))
def test_a_region_is_taken_exactly_if_it_has_pixels(box):
    left, top, right, bottom = box
    if 0 <= left < right and 0 <= top < bottom:
        assert Concept(name="cat", region=box).region == box
        return
    message = r"a region is \(left, top, right, bottom\) in pixels with 0 <= left < right"
    with pytest.raises(FieldError, match=message):
        Concept(name="cat", region=box)


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 250), st.integers(1, 250))
def test_a_region_must_lie_on_the_canvas(width, height, right, bottom):
    concept = Concept(name="cat", region=(0, 0, right, bottom))
    scene = {"prompt": "sks", "concepts": (concept,), "width": width, "height": height}
    if right <= width and bottom <= height:
        assert Scene(**scene).concepts == (concept,)
        return
    message = rf"the region \(0, 0, {right}, {bottom}\) of concept 'cat' leaves the canvas of {width} x {height}"
    with pytest.raises(FieldError, match=message):
        Scene(**scene)


def test_sides_of_the_canvas_that_are_unknown_are_not_checked():
    concept = Concept(name="cat", region=(0, 0, 100, 100))
    assert Scene(prompt="sks", concepts=(concept,)).concepts == (concept,)
    check_box(concept, None, 100)
    check_box(concept, 100, None)
    with pytest.raises(ValueError, match="leaves the canvas of None x 99"):
        check_box(concept, None, 99)
    with pytest.raises(ValueError, match="leaves the canvas of 99 x None"):
        check_box(concept, 99, None)


def test_names_of_concepts_differ():
    twice = (Concept(name="cat"), Concept(name="dog"), Concept(name="cat"))
    with pytest.raises(FieldError, match="concept names must differ, but 'cat' stands twice"):
        Scene(prompt="sks", concepts=twice)
    with pytest.raises(ValueError, match="'cat' stands twice"):
        check_names(twice)
    check_names(twice[:2])


@pytest.mark.parametrize(("kind", "fields", "message"), [
    (Concept, {"name": ""}, "at least 1 character"),
    (Scene, {"prompt": ""}, "at least 1 character"),
    (Scene, {"prompt": "sks", "width": 0}, "greater than 0"),
    (Scene, {"prompt": "sks", "height": -8}, "greater than 0"),
    (Scene, {"prompt": "sks", "height": 64.5}, "valid integer"),
    (Scene, {"prompt": "sks", "concepts": "cat"}, "tuple"),
    (Scene, {"prompt": "sks", "concepts": [{"name": "cat", "wieght": 1}]}, "concepts.0..wieght"),
    (Concept, {"name": "cat", "weight": -11}, "the weight reaches 11; .* any_weight=True"),
    (Concept, {"name": "cat", "weight": (0, 0, 64, 128)}, "reaches 128; .*; a box is a region, not a weight"),
    (Concept, {"name": "cat", "weight": (0, 0, 64)}, "reaches 64; .*; a box is four numbers: left, top, right, bottom"),
    (Concept, {"name": "cat", "weight": (64, 0, 32, 128)}, "reaches 128; .*; a box is four numbers: left, top, right"),
    (Concept, {"name": "cat", "weight": 5, "blocks": {"down": -3}}, "reaches 15"),
    (Concept, {"name": "cat", "lora": ["a.safetensors:40", "b.safetensors"]}, "reaches 40"),
    (Scene, {"prompt": "sks", "concepts": [{"name": "cat", "weight": 30}]}, "concepts.0.: the weight reaches 30"),
    (Run, {"scene": SCENE, "model": "playground", "steps": 0}, "greater than 0"),
    (Run, {"scene": SCENE, "model": "playground", "seed": -1}, "greater than or equal to 0"),
    (Run, {"scene": SCENE, "model": "playground", "seed": 2**63}, "less than"),
    (Run, {"scene": SCENE, "model": "playground", "dtype": "float8"}, "match pattern"),
    (Run, {"scene": SCENE, "model": "playground", "dtype": "float32\n"}, "match pattern"),
    (Run, {"scene": {"prompt": ""}, "model": "playground"}, "scene.prompt"),
])  # fmt: skip
def test_bad_values_are_refused(kind, fields, message):
    with pytest.raises(FieldError, match=message):
        kind(**fields)


@pytest.mark.parametrize(
    ("fields", "plain"),
    [
        ({"weight": np.float32(0.5)}, {"weight": 0.5}),
        ({"weight": torch.tensor(0.5)}, {"weight": 0.5}),
        ({"weight": (np.float32(1), 0)}, {"weight": (1.0, 0.0)}),
        ({"region": np.array([0, 8, 64, 72])}, {"region": (0, 8, 64, 72)}),
        ({"region": tuple(torch.tensor([0, 8, 64, 72]))}, {"region": (0, 8, 64, 72)}),
        ({"region": tuple(np.array([0, 0, 0.5, 1], np.float32))}, {"region": (0.0, 0.0, 0.5, 1.0)}),
    ],
)
def test_numbers_of_numpy_and_torch_are_weights_and_boxes(fields, plain):
    assert Concept(name="cat", **fields) == Concept(name="cat", **plain)


def test_a_weight_in_many_lists_is_refused_in_words():
    nested: Any = 1.0
    for _ in range(5000):
        nested = [nested]
    with pytest.raises(FieldError, match="expected a valid number"):
        Concept(name="cat", weight=nested)


def test_a_box_of_numpy_by_name_is_a_region():
    (cat,) = concepts_of({"cat": np.array([0, 8, 64, 72])})
    assert cat.region == (0, 8, 64, 72)


def test_any_weight_is_taken_if_it_is_asked_for():
    assert Concept(name="cat", weight="0:1,0.5:-30", blocks={"up": 90}, any_weight=True).any_weight
    assert Concept(name="cat", weight=10, blocks={"up": 0.5}).any_weight is None


def test_a_run_survives_json():
    concepts = (Concept(name="cat", lora="playground:cat", trigger="sks", weight=0.5, region=(0, 0, 64, 128)),)
    scene = Scene(prompt="a sks cat, \u732b", negative_prompt="dark", concepts=concepts, width=128, height=128)
    run = Run(scene=scene, model="playground", method="tara", settings={"scope": "cross_kv"}, seed=2**63 - 1)
    assert Run.model_validate_json(run.model_dump_json()) == run
    assert Run.model_validate(run.model_dump()) == run


def test_the_settings_of_a_run_are_its_own():
    settings = {"scope": "all"}
    run = Run(scene=SCENE, model="playground", settings=settings)
    settings["scope"] = "cross_kv"
    assert run.settings == {"scope": "all"}


@pytest.mark.parametrize(
    ("trigger", "noun", "bare"),
    [
        ("alc woman", "woman", "alc"),
        ("alc old Woman", "old woman", "alc"),
        ("hatsune miku, 1girl", "1girl", "hatsune miku"),
        ("ohwx_man", "man", "ohwx"),
        ("alc_blue coat_woman", "coat woman", "alc_blue"),
        ("alc blue coat woman", "coat_woman", "alc blue"),
        ("ohwx_man", "woman", "ohwx_man"),
        ("_man", "man", "_man"),
        ("woman", "woman", "woman"),
        ("alcwoman", "woman", "alcwoman"),
        ("sks", "cat", "sks"),
    ],
)
def test_a_class_word_at_the_end_of_a_trigger_is_no_part_of_it(trigger: str, noun: str, bare: str) -> None:
    whole = Concept(name="a", trigger=trigger, class_word=noun)
    assert (whole.trigger, whole.class_word) == (bare, noun)
    halves: list[dict[str, Any]] = [{"trigger": trigger}, {"class_word": noun}]
    for one, other in (halves, halves[::-1]):
        assert Concept(name="a", **one).completed(Concept(name="a", **other)) == whole


def test_a_style_that_was_loaded_takes_no_region_and_a_concept_with_a_region_is_no_style() -> None:
    style, box = Concept(name="ink", role="style"), Concept(name="ink", region=(0, 0, 64, 64))
    for asked, known in ((box, style), (style, box)):
        with pytest.raises(ValueError, match="'ink' is a style, which acts everywhere: leave out its region or its"):
            asked.completed(known)
    assert box.completed(Concept(name="ink", role="subject")).region == (0, 0, 64, 64)


@pytest.mark.parametrize(
    ("class_word", "noun"),
    [
        ("cat", "cat"),
        ("old Cat", "cat"),
        ("cat ", "cat"),
        ("old\tcat\n", "cat"),
        ("old_Cat", "cat"),
        (" ", ""),
        ("", ""),
        (None, ""),
    ],
)
def test_the_head_noun_is_the_last_word(class_word: str | None, noun: str) -> None:
    assert Concept(name="a", class_word=class_word).head_noun == noun


def test_a_concept_is_shown_without_the_fields_that_were_not_given() -> None:
    assert repr(Concept(name="cat", region=(0, 0, 64, 64))) == "Concept(name='cat', region=(0, 0, 64, 64))"
    assert repr(SCENE) == "Scene(prompt='a sks cat')"


@pytest.mark.parametrize("region", [(0, 0, 1.5, 1), (0.5, 0, 64, 64), (0, 0, math.nan, 1), [0, 0, 64.5, 64]])
def test_a_region_is_in_whole_pixels_or_in_fractions(region: Any) -> None:
    with pytest.raises(FieldError, match="a box is in whole pixels, or in fractions of 0 to 1 such as"):
        Concept(name="cat", region=region)
