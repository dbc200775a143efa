"""The page's logic, without a browser and without Streamlit."""

import ast
import base64
import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from commands import call
from components import installed
from lora_compose.compose.benchmark.counting import Counted
from lora_compose.compose.check import report
from lora_compose.compose.check.report import check
from lora_compose.compose.evaluation.suite import read_suite
from lora_compose.compose.figures import overlay
from lora_compose.compose.figures.overlay import Attention
from lora_compose.compose.files.images import Machine, Record, png_bytes, read_pixels, read_record
from lora_compose.compose.files.reading import FileError
from lora_compose.compose.files.scenes import read_scene
from lora_compose.compose.files.text import parse_value
from lora_compose.compose.generate.making import load, make
from lora_compose.compose.generate.models import open_model
from lora_compose.compose.page import (
    boxes,
    catalog,
    controls,
    export,
    form,
    labels,
    launch,
    store,
    text,
    work,
)
from lora_compose.compose.page.open_models import Busy, ModelChoice, OpenModel, OpenModels, Stopped
from lora_compose.compose.page.scores import SUITES, Judge
from lora_compose.compose.page.screen.canvas import what_next
from lora_compose.compose.page.sessions import Sessions
from lora_compose.compose.page.words import as_html, cut_off, read_prompt, with_phrase
from lora_compose.compose.playground.assets import PLAYGROUND, PLAYGROUND_FLUX, playground_lora, playground_model
from lora_compose.compose.support import folders
from lora_compose.compose.support.savers import Saver
from lora_compose.pipelines.concepts.loading import LoraError
from lora_compose.pipelines.merging import MERGERS
from lora_compose.pipelines.methods import METHODS, Composite, LoraComposer, Tara, make_method
from lora_compose.pipelines.scene.scene import Concept, Run, Scene
from lora_compose.pipelines.support.regular import sha256_of
from pairs import slow_but
from small_world import SIZE, STYLE

pytestmark = pytest.mark.usefixtures("playgrounds_opened_once")

BEAR = Concept(name="bear", lora="playground:bear", trigger="xlo", class_word="bear")
ROBOT = Concept(name="robot", lora="playground:robot", trigger="qrt", class_word="robot")
OTHER = Concept(name="other bear", role="bystander", class_word="bear")
"""A bystander of the class of a LoRA."""


@pytest.fixture(scope="module")
def model() -> OpenModel:
    return OpenModels().open(ModelChoice(PLAYGROUND, device="cpu"))


@pytest.fixture(scope="module")
def judge() -> Judge:
    """A judge of the example's two characters, since embedding the references of all takes longer."""
    judge, suite = Judge(), read_suite(SUITES[PLAYGROUND])
    few = tuple(suite.concept(name) for name in ("bear", "robot"))
    judge._suites[PLAYGROUND] = suite.model_copy(update={"concepts": few})
    return judge


def short(steps: int = 1, **changes: Any) -> form.Form:
    """The example, in one step."""
    return replace(form.example(), choice=ModelChoice(PLAYGROUND, device="cpu"), steps=steps, **changes)


# --- the example, limits ---


def test_the_example_is_complete() -> None:
    example = form.example()
    (run,) = example.runs()
    assert [concept.name for concept in run.scene.concepts] == ["bear", "robot"]
    assert all(isinstance(concept.region, tuple) for concept in run.scene.concepts)
    assert form.form_of(run, (SIZE, SIZE)) == replace(example, choice=ModelChoice(PLAYGROUND, "float32", None))


def test_settings_of_the_authors_are_shown_one_by_one() -> None:
    scene = Scene(prompt="a xlo bear", concepts=(BEAR,))
    run = Run(scene=scene, model=PLAYGROUND, method="lora-composer:official", settings={"apart": 0.5})
    shown = form.form_of(run, (128, 128))
    assert shown.method == "lora-composer"
    assert make_method(shown.method, shown.settings) == replace(LoraComposer.official(), apart=0.5)


def test_regions_are_kept_but_do_not_count_while_boxes_are_off() -> None:
    (run,) = short(boxed=False, method="merge").runs()
    assert all(concept.region is None for concept in run.scene.concepts)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"concepts": tuple(BEAR.model_copy(update={"name": f"bear {i}"}) for i in range(200))}, "200 concepts"),
        ({"size": (100_000, 128)}, "100000 x 128 pixels"),
        ({"size": (129, 128)}, "multiple of 8"),
        ({"prompt": "a " * 5000}, "2000 characters"),
        ({"prompt": "  "}, "Write a prompt"),
        ({"steps": 10**9}, "1000000000 steps"),
        ({"seeds": tuple(range(100))}, "100 seeds"),
        ({"concepts": (BEAR.model_copy(update={"name": "b" * 1000}),)}, "60 letters"),
        ({"method": "nothing"}, "no method 'nothing'"),
        ({"concepts": (BEAR, BEAR)}, "'bear' stands twice"),
    ],
)
def test_too_much_is_refused_in_words(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(short(), **changes).runs()


@pytest.mark.parametrize(
    ("scene", "changes", "words"),
    [
        ({}, {"scheduler": "TomorrowScheduler"}, "unknown scheduler 'TomorrowScheduler'"),
        ({}, {"method": "tomorrow"}, "unknown method 'tomorrow'"),
        ({}, {"settings": {"tomorrow": 1}, "method": "tara"}, "tara has no settings"),
        ({}, {"settings": {"scope": "tomorrow"}, "method": "tara"}, "scope must be"),
        ({}, {"settings": {"scope": "cross_kv"}, "method": None}, "the settings scope, but no method"),
        ({"concepts": ()}, {"method": "tara"}, "the method tara, but no concepts"),
        ({}, {"settings": {"interval": 2**60}, "method": "switch"}, "interval is 1152921504606846976"),
        ({}, {"steps": 2**60}, "the page takes 1 to 200"),
        ({"concepts": (BEAR.model_copy(update={"trigger": "x" * 100}),)}, {}, "60 letters each"),
        ({"concepts": tuple(BEAR.model_copy(update={"name": f"{i}"}) for i in range(200))}, {}, "200 concepts are too"),
        ({"width": 80_000}, {}, f"80000 x {SIZE} pixels"),
        (
            {"concepts": (BEAR.model_copy(update={"region": (0, 0, 512, 1024)}),), "width": None, "height": None},
            {},
            "leaves the canvas of 128 x 128 pixels; open the model playground first",
        ),
    ],
)
def test_settings_of_an_image_that_the_page_does_not_support_are_refused(
    scene: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    (run,) = short(method="merge").runs()
    run = run.model_copy(update={"scene": run.scene.model_copy(update=scene), **changes})
    with pytest.raises(ValueError, match=words):
        form.form_of(run, (128, 128))


def test_a_canvas_far_from_the_models_own_is_refused() -> None:
    form.check_canvas((512, 128), (128, 128))
    with pytest.raises(ValueError, match="made for 128 x 128"):
        form.check_canvas((520, 128), (128, 128))


def test_variations_leave_weights_that_change_over_the_steps() -> None:
    robot = ROBOT.model_copy(update={"weight": "1..0.4"})
    (run,) = short(concepts=(BEAR, robot), method="merge").runs()
    varied = form.variations(run)
    assert [run.scene.concepts[0].weight for run in varied] == list(form.FACTORS)
    assert {run.scene.concepts[1].weight for run in varied} == {"1..0.4"}
    (run,) = short(concepts=(robot,), method="merge").runs()
    assert form.variations(run) == []


def test_variations_leave_bystanders_without_a_weight() -> None:
    (run,) = short(concepts=(OTHER, BEAR), method="draft").runs()
    varied = form.variations(run)
    assert [[concept.weight for concept in run.scene.concepts] for run in varied] == [
        [None, factor] for factor in form.FACTORS
    ]
    (run,) = short(concepts=(OTHER,), method="draft").runs()
    assert form.variations(run) == []


def test_a_bystander_is_kept_with_its_box_and_without_a_lora() -> None:
    boxed = OTHER.model_copy(update={"region": (64, 0, 128, 128)})
    (run,) = short(concepts=(BEAR, boxed)).runs()
    assert run.scene.concepts[1] == boxed
    assert form.form_of(run, (SIZE, SIZE)).concepts[1] == boxed
    (run,) = short(concepts=(BEAR, boxed), boxed=False).runs()
    assert run.scene.concepts[1] == OTHER


def test_seeds_as_they_are_typed() -> None:
    assert form.read_seeds("0, 2,2 5-7") == (0, 2, 5, 6, 7)
    assert form.read_seeds(str(2**63 - 1)) == (2**63 - 1,)
    for wrong in ("", "a", "-1", "7-5", "0-99999999999", str(2**63), "1.5"):
        with pytest.raises(ValueError, match=r"[Ss]eed"):
            form.read_seeds(wrong)


def test_names_stay_different() -> None:
    assert form.free_name("cat", ["dog"]) == "cat"
    assert form.free_name("cat", ["cat", "cat 2"]) == "cat 3"
    assert form.free_name(" ", []) == "concept"


# --- controls ---


@pytest.mark.parametrize("method", METHODS)
def test_every_setting_of_every_method_has_a_control_and_a_text(method: str) -> None:
    found = controls.controls(method)
    assert [control.name for control in found] == [field.name for field in dataclasses.fields(METHODS[method])]  # pyright: ignore[reportArgumentType]
    assert all(control.help for control in found)
    assert controls.sentence(method).endswith(".")
    assert controls.changed(method, {control.name: control.shown(control.default) for control in found}) == {}


def test_controls_are_made_from_types(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class New:
        """A method of tomorrow.

        Attributes:
            where: Where it acts,
                on two lines.
            often: How often.
            strong: How strongly.
            twice: Whether twice.
            parts: Which parts.
            text: What is read.
        """

        where: Literal["here", "there"] = "here"
        often: int = 3
        strong: float = 0.5
        twice: bool = False
        parts: tuple[int, ...] = ()
        text: str | None = None

        def start(self, engine: Any) -> Any:
            raise NotImplementedError

    monkeypatch.setitem(METHODS, "new", New)  # pyright: ignore[reportArgumentType]
    found = {control.name: control for control in controls.controls("new")}
    assert {name: control.kind for name, control in found.items()} == {
        "where": "choice", "often": "whole", "strong": "number", "twice": "switch", "parts": "yaml", "text": "words",
    }  # fmt: skip
    assert found["where"].choices == ("here", "there")
    assert found["where"].help == "where: Where it acts, on two lines."
    assert found["where"].label == "where"
    shown = {"where": "there", "often": 3, "strong": 0.5, "twice": True, "parts": "[1, 2]"}
    assert controls.changed("new", shown) == {"where": "there", "twice": True, "parts": [1, 2]}
    assert controls.changed("new", {"parts": "[]", "text": " "}) == {}
    assert controls.changed("new", {"text": "a cat: on grass"}) == {"text": "a cat: on grass"}
    assert export._as_yaml("a cat") == "a cat"
    assert all(
        parse_value(export._as_yaml(value)) == value for value in (True, None, 0.5, "yes", [1, "a: b"], {"a": 1})
    )


def test_settings_that_a_method_does_not_take_are_reported() -> None:
    with pytest.raises(ValueError, match="interval must be a whole number"):
        controls.changed("switch", {"interval": 0})
    assert controls.changed("composite", {"shares": "[1, 2]"}) == {"shares": [1, 2]}
    (shares,) = controls.controls("composite")
    assert shares.shown(Composite([1, 2]).shares) == "[1, 2]"


def test_methods_that_keep_no_lora_off_a_bystander_are_known() -> None:
    without = {name for name, label in labels.METHOD_LABELS.items() if not label.knows_places}
    assert without == {"merge", "switch", "composite", "tara"}


def test_every_way_of_merging_has_words() -> None:
    assert [*labels.MERGER_LABELS] == [*MERGERS]
    assert all(name not in MERGERS and sentence.endswith(".") for name, sentence in labels.MERGER_LABELS.values())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_and_setting_is_called_by_what_it_does(method: str) -> None:
    label = labels.label_of(method)
    assert label.name != method
    assert label.sentence.endswith(".")
    assert method in labels.methods()
    found = controls.controls(method)
    assert [control.name for control in found if control.name not in labels.SETTING_LABELS[method]] == []
    assert not any("_" in control.label for control in found)
    shown = [labels.choice_label(control.name, value) for control in found for value in control.choices]
    assert not any("_" in words for words in shown)
    assert all(control.help.startswith(f"{control.name}: ") for control in found)


# --- messages ---


def problems_of(model: OpenModel, method: str | None, **changes: Any) -> Iterator[str]:
    """All that is wrong with, and to be known of, a form, in the page's words."""
    with model.turn((BEAR, ROBOT)) as pipe:
        found = check(replace(short(**changes), method=method, settings={}).runs()[0], pipe)
    yield from (text.page_message(said, method) for said in (*found.problems, *found.notes))


@pytest.mark.usefixtures("costs_do_not_matter")
@pytest.mark.parametrize("method", slow_but(("merge", "lora-composer", "draft"), METHODS))
def test_errors_are_reported_without_python(model: OpenModel, method: str) -> None:
    robot = ROBOT.model_copy(update={"trigger": ""})
    wrong = [
        {"boxed": False},
        {"concepts": (BEAR, robot)},
        {"prompt": "a xlo and a qrt robot"},
        {"concepts": (BEAR.model_copy(update={"prompt": "a bear"}), ROBOT)},
        {"concepts": (BEAR.model_copy(update={"blocks": {"up.9": 0.5}}), ROBOT)},
        {"concepts": (BEAR.model_copy(update={"alpha": 3.0}), ROBOT)},
    ]
    said = [words for changes in wrong for words in problems_of(model, method, **changes)]
    assert len(said) >= 3
    for words in said:
        assert not re.search(r"\w=|Concept\(|[{}\[\]]|\W'|'\W|\bNone\b|lora-composer|clora", words), words
        assert words[0].isupper() or words.startswith(("“", "bear.safetensors"))


def weighing(run: Run, weight: Any) -> Run:
    """The run with another weight of the first concept."""
    first, *others = run.scene.concepts
    concepts = (first.model_copy(update={"weight": weight}), *others)
    return run.model_copy(update={"scene": run.scene.model_copy(update={"concepts": concepts})})


@pytest.mark.parametrize("weight", slow_but([-1.5], [0.4, -1.5]))
@pytest.mark.parametrize("method", slow_but(["regional"], ["merge", "regional"]))
def test_constant_weights_cost_the_same(model: OpenModel, method: str, weight: float) -> None:
    (run,) = short(method=method).runs()
    with model.turn(()) as pipe:
        expected = check(run, pipe).cost
        assert expected is not None
        assert check(weighing(run, weight), pipe).cost == expected


def test_a_cost_is_counted_once_for_all_prompts_and_weights(model: OpenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    costs: dict[str, Counted] = {}
    (run,) = short(method="regional").runs()
    other = run.model_copy(update={"scene": run.scene.model_copy(update={"prompt": "a qrt robot, a xlo bear"})})
    with model.turn(()) as pipe:
        counted = check(run, pipe, known_costs=costs).cost
        monkeypatch.setattr(report, "count_run", None)
        assert counted is not None
        assert check(other, pipe, known_costs=costs).cost == counted
        assert check(weighing(run, 0.7), pipe, known_costs=costs).cost == counted
        changed = [
            run.model_copy(update=change) for change in ({"steps": 3}, {"guidance_scale": 1.0}, {"method": "merge"})
        ]
        for costly in (*changed, weighing(run, "1..0.4"), weighing(run, 0.0)):
            with pytest.raises(TypeError, match="not callable"):
                check(costly, pipe, known_costs=costs)


def test_messages_keep_what_they_are_about() -> None:
    assert text.page_message("interval must be a whole number of steps, at least 1, not 0", "switch") == (
        "“Steps of a turn” must be a whole number of steps, at least 1, not 0"
    )
    assert text.page_message("x9.safetensors is no LoRA", files={"x9.safetensors": "cat.safetensors"}) == (
        "cat.safetensors is no LoRA"
    )
    found = text.page_message(
        "merge needs it: give one, for example Concept(name='a', region=(1, 2)) in pixels; or not"
    )
    assert found == "“Added up” needs it: give one, or not"


# --- text ---


def test_markup_of_users_is_text() -> None:
    assert text.markup('<b onclick="x">&') == "&lt;b onclick=&quot;x&quot;&gt;&amp;"
    assert text.markdown("**a** [b](c) :red[d] $e$\n# f") == (r"\*\*a\*\* \[b\]\(c\) \:red\[d\] \$e\$ \# f")
    assert "\u202e" not in text.markdown("a\u202eb")


# --- words ---


def test_words_are_found_and_coloured(model: OpenModel) -> None:
    prompt = "a xlo bear and a qrt robot on grass"
    reading = read_prompt(prompt, [BEAR, ROBOT], model.tokenizer)
    assert [(prompt[mark.start : mark.end], mark.concept) for mark in reading.marks] == [
        ("xlo", 0), ("bear", 0), ("qrt", 1), ("robot", 1),
    ]  # fmt: skip
    assert (reading.flags, reading.missing, reading.unready, reading.cut) == ((), (), False, None)
    assert f"--concept:{overlay.colour(1)}" in as_html(prompt, reading)


def test_what_is_wrong_with_words_is_flagged(model: OpenModel) -> None:
    def flags(prompt: str, *concepts: Concept) -> str:
        return "\n".join(read_prompt(prompt, concepts, model.tokenizer).flags)

    assert "robot is missing in the prompt: write “qrt robot”" in flags("a xlo bear", BEAR, ROBOT)
    assert "Write “bear” after the trigger" in flags("a xlo", BEAR)
    assert "occurs 2 times" in flags("a xlo bear and a xlo bear", BEAR)
    assert "share words" in flags("a xlo bear", BEAR, ROBOT.model_copy(update={"trigger": "xlo"}))
    assert "needs a trigger word" in flags("a bear", BEAR.model_copy(update={"trigger": ""}))
    own = ROBOT.model_copy(update={"prompt": "a qrt robot"})
    assert flags("a xlo bear", BEAR, own) == ""  # named in its own prompt


def test_a_bystander_has_the_class_words_that_follow_no_trigger(model: OpenModel) -> None:
    prompt = "a bear beside a xlo bear and a big bear"
    reading = read_prompt(prompt, [BEAR, OTHER], model.tokenizer)
    assert [(mark.start, prompt[mark.start : mark.end], mark.concept, mark.kind) for mark in reading.marks] == [
        (2, "bear", 1, "class word"),
        (16, "xlo", 0, "trigger"),
        (20, "bear", 0, "class word"),
        (35, "bear", 1, "class word"),
    ]
    assert (reading.flags, reading.missing, reading.unready) == ((), (), False)
    reading = read_prompt("a (xlo bear:1.2) on grass", [BEAR, OTHER], model.tokenizer)
    assert reading.flags == ("other bear is missing in the prompt: write “bear” where it follows no trigger.",)
    assert (reading.missing, reading.unready) == ((1,), False), "boxes need no word of it"
    own = OTHER.model_copy(update={"prompt": "a bear"})
    assert read_prompt("a xlo bear", [BEAR, own], model.tokenizer).flags == ()  # named in its own prompt


def test_a_trigger_has_no_class_word_behind_another_trigger(model: OpenModel) -> None:
    prompt = "a xlo beside a qrt bear"
    second = ROBOT.model_copy(update={"class_word": "bear"})
    reading = read_prompt(prompt, [BEAR, second], model.tokenizer)
    assert [(prompt[mark.start : mark.end], mark.concept) for mark in reading.marks] == [
        ("xlo", 0), ("qrt", 1), ("bear", 1),
    ]  # fmt: skip
    assert reading.flags == ("Write “bear” after the trigger “xlo” of bear.",)


def test_what_the_model_does_not_read_is_struck_through(model: OpenModel) -> None:
    prompt = "a bear " + "cat " * 60 + "and a robot"
    cut = cut_off(prompt, model.tokenizer)
    reading = read_prompt(prompt, [], model.tokenizer)
    assert cut is not None
    assert prompt[:cut].count("cat") < 60
    assert any("it ignores" in flag for flag in reading.flags)
    assert "and a robot</del>" in as_html(prompt, reading)


def test_with_concepts_long_prompts_and_weights_are_read(model: OpenModel) -> None:
    prompt = "a (xlo bear:1.3) " + "cat " * 60 + "and a qrt robot"
    reading = read_prompt(prompt, [BEAR, ROBOT], model.tokenizer)
    assert (reading.flags, reading.cut, len(reading.marks)) == ((), None, 4)
    assert "is 99; expected 0 to 10" in read_prompt("a (xlo bear:99)", [BEAR], model.tokenizer).flags[0]


def test_a_prompt_is_text_in_html(model: OpenModel) -> None:
    prompt = "a xlo bear <script>alert(1)</script>"
    assert "<script>" not in as_html(prompt, read_prompt(prompt, [BEAR], model.tokenizer))


def test_a_phrase_is_inserted_where_it_belongs() -> None:
    assert with_phrase("", BEAR, [ROBOT]) == "a xlo bear"
    assert with_phrase("a qrt robot on grass", BEAR, [ROBOT]) == "a qrt robot and a xlo bear on grass"
    assert with_phrase("a bear and a qrt robot", BEAR, [ROBOT]) == "a xlo bear and a qrt robot"
    assert with_phrase("in snow", BEAR, []) == "in snow, a xlo bear"
    second = BEAR.model_copy(update={"name": "other", "trigger": "sks"})
    assert with_phrase("a xlo bear", second, [BEAR]) == "a xlo bear and a sks bear"


@pytest.mark.parametrize(
    ("before", "concept", "others", "after"),
    [
        ("a xlo bear on grass", OTHER, [BEAR], "a xlo bear and a bear on grass"),
        ("in snow", OTHER, [], "in snow, a bear"),
        ("a bear on grass", BEAR, [OTHER], "a bear and a xlo bear on grass"),
        ("an old bear", BEAR, [OTHER.model_copy(update={"class_word": "old bear"})], "an old bear and a xlo bear"),
        ("a xlo old bear", OTHER.model_copy(update={"class_word": "old bear"}), [BEAR],
         "a xlo old bear and an old bear"),
    ],
)  # fmt: skip
def test_a_bystander_keeps_a_class_word_of_its_own(
    model: OpenModel, before: str, concept: Concept, others: list[Concept], after: str
) -> None:
    assert with_phrase(before, concept, others) == after
    assert read_prompt(after, [concept, *others], model.tokenizer).missing == ()


# --- boxes ---


@pytest.mark.parametrize("name", boxes.TEMPLATES)
@pytest.mark.parametrize("number", [1, 2, 3, 12])
def test_templates_fill_the_canvas_without_overlap(name: str, number: int) -> None:
    found = boxes.template(name, number, 512, 256)
    assert len(found) == number
    assert all(0 <= left < right <= 512 and 0 <= top < bottom <= 256 for left, top, right, bottom in found)
    assert all(a[2] <= b[0] for a, b in pairwise(found))


@pytest.mark.parametrize("size", [(128, 128), (512, 256), (64, 2048)])
def test_one_more_box_is_over_no_other(size: tuple[int, int]) -> None:
    found: list[boxes.Box] = []
    for number in range(1, 7):
        found = boxes.one_more(found, *size)
        assert len(found) == number
        assert all(0 <= left < right <= size[0] and 0 <= top < bottom <= size[1] for left, top, right, bottom in found)
        for a, b in combinations(found, 2):
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_a_free_place_is_taken_before_a_box_is_divided() -> None:
    assert boxes.one_more([(0, 0, 40, 128)], 128, 128) == [(0, 0, 40, 128), (44, 4, 124, 124)]
    assert boxes.one_more([(0, 0, 120, 128)], 128, 128) == [(0, 0, 120, 62), (0, 66, 120, 128)]


def test_drawn_boxes_are_made_to_fit() -> None:
    assert boxes.fitted([100.4, 50, 20, 10], 128, 128) == (20, 10, 100, 50)
    assert boxes.fitted([-50, -1e5, 1e5, 500], 128, 64) == (0, 0, 128, 64)
    assert boxes.fitted([128, 128, 128, 128], 128, 128) == (120, 120, 128, 128)


# --- files ---


@pytest.fixture
def files() -> store.Store:
    return store.Store()


def opened(path: Path) -> BytesIO:
    return BytesIO(path.read_bytes())


def test_an_upload_is_kept_under_a_name_of_ours_and_described(files: store.Store) -> None:
    lora = files.add_upload("../../../etc/cat.safetensors", opened(playground_lora("cat")))
    path = Path(lora.source)
    assert path.parent == files.folder
    assert "cat" not in path.name
    assert (lora.shown, lora.trigger, lora.class_word) == ("cat.safetensors", "sks", "cat")
    assert files.add_upload("again.safetensors", opened(playground_lora("cat"))) == lora
    assert list(files.folder.iterdir()) == [path]


@pytest.mark.parametrize("name", ["..\\..\\evil.safetensors", "/etc/passwd.safetensors", "a\0b.safetensors", "../"])
def test_names_lead_nowhere(files: store.Store, name: str, tmp_path: Path) -> None:
    before = set(files.folder.parent.iterdir())
    with pytest.raises((LoraError, FileError)):
        files.add_upload(name, BytesIO(b"no LoRA"))
    assert set(files.folder.parent.iterdir()) == before
    assert list(files.folder.iterdir()) == []


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x80\x04K\x01.", "a pickle or an archive under another name"),
        (b"PK\x03\x04" + bytes(1000), "a pickle or an archive under another name"),
        (b"", "truncated or corrupt"),
        ((2**40).to_bytes(8, "little") + b"{}", "truncated or corrupt"),
        ((2).to_bytes(8, "little") + b"{}", "is not a LoRA"),
    ],
)
def test_what_is_no_lora_is_refused_at_the_file_and_not_kept(files: store.Store, data: bytes, words: str) -> None:
    with pytest.raises(LoraError, match=words) as caught:
        files.add_upload("mine.safetensors", BytesIO(data))
    assert str(caught.value).startswith("mine.safetensors")
    assert list(files.folder.iterdir()) == []


def test_too_large_and_other_formats_are_refused(files: store.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "UPLOAD_LIMIT", 2**20)
    with pytest.raises(FileError, match="larger than 1 MB"):
        files.add_upload("a.safetensors", BytesIO(bytes(2**20 + 1)))
    with pytest.raises(FileError, match=r"only \.safetensors"):
        files.add_upload("a.ckpt", BytesIO(b""))
    assert list(files.folder.iterdir()) == []


@pytest.mark.parametrize("raised", [MemoryError(), OSError(28, "No space left on device"), KeyError("x")])
def test_an_upload_that_fails_in_whatever_way_leaves_no_file(
    files: store.Store, raised: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Breaking(BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell():
                raise raised
            return super().read(4)

    with pytest.raises(type(raised)):
        files.add_upload("cat.safetensors", Breaking(b"12345678"))
    assert list(files.folder.iterdir()) == []

    def fails(path: Path) -> Any:
        raise raised

    monkeypatch.setattr(store, "read_lora", fails)
    with pytest.raises(type(raised)):
        files.add_upload("cat.safetensors", opened(playground_lora("cat")))
    assert list(files.folder.iterdir()) == []
    assert files.uploads == []


def test_the_files_of_a_visit_are_gone_with_it(files: store.Store) -> None:
    files.add_upload("cat.safetensors", opened(playground_lora("cat")))
    assert files.close()
    assert not files.folder.exists()
    with pytest.raises(FileNotFoundError):
        files.add_upload("cat.safetensors", opened(playground_lora("cat")))
    assert not files.folder.exists()
    assert files.close()


def test_what_a_killed_page_has_left_is_removed_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder of a killed process is removed; a running one keeps its own."""
    # By its path alone: a whole page takes seconds to start.
    code = f"import runpy; print(runpy.run_path({folders.__file__!r})['of_this_process']('page'), flush=True); input()"
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    pages = []
    for _ in range(2):
        page = subprocess.Popen([sys.executable, "-c", code], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                text=True)  # fmt: skip
        assert page.stdout is not None
        pages.append((page, Path(page.stdout.readline().strip())))
    (killed, left), (living, used) = pages
    try:
        killed.kill()
        killed.wait()
        assert left.is_dir(), "nobody has tidied up after it"
        for name in ("lora-compose-page-mine", "other"):  # without a lock, and without the name
            (tmp_path / name).mkdir()
        (tmp_path / "lora-compose-page-link").symlink_to(tmp_path / "other")
        (tmp_path / "lora-compose-page-link.lock").symlink_to(tmp_path / "other")
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        folders.remove_abandoned()
        found = {path.name for path in tmp_path.iterdir()}
        others = {"lora-compose-page-mine", "other", "lora-compose-page-link", "lora-compose-page-link.lock"}
        assert found == {*others, used.name, f"{used.name}.lock"}
        assert used.is_dir()
    finally:
        living.communicate("\n", timeout=30)
    assert not used.exists(), "a page that ends removes its folder"


# --- sessions ---


class Visiting:
    """A session of which nothing is left when it is closed for the second time."""

    def __init__(self) -> None:
        self.closings = 0

    def close(self) -> bool:
        self.closings += 1
        return self.closings >= 2


def test_a_visit_ends_when_its_browser_has_been_away_for_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    there = {"a", "b"}
    monkeypatch.setattr(time, "monotonic", lambda: now)
    sessions = Sessions(there.__contains__, grace=20, every=1e9)
    first, second = Visiting(), Visiting()
    sessions.add("a", first)
    sessions.add("b", second)

    def later(seconds: float) -> tuple[int, int]:
        nonlocal now
        now += seconds
        sessions.look()
        return first.closings, second.closings

    assert later(1000) == (0, 0)
    there.clear()
    assert later(15) == (0, 0)
    there.add("b")
    assert later(10) == (1, 0), "a has been away for 25 seconds, b is back"
    assert later(1) == (2, 0), "something was left"
    assert later(1) == (2, 0)
    there.clear()
    assert later(30) == (2, 1)


def test_a_session_goes_on_in_another_one_of_its_browser_and_only_if_that_has_gone() -> None:
    there = {"a", "new"}
    sessions, visiting, other = Sessions(there.__contains__, grace=0, every=1e9), Visiting(), Visiting()
    sessions.add("a", visiting)
    assert not sessions.move(visiting, "new"), "its browser is there"
    assert not sessions.move(other, "new"), "it is not known, or has ended"
    there.remove("a")
    assert sessions.move(visiting, "new")
    sessions.look()
    assert visiting.closings == 0


def test_a_session_that_cannot_be_closed_keeps_no_other_open() -> None:
    class Stubborn:
        def close(self) -> bool:
            raise RuntimeError("not now")

    sessions = Sessions(lambda session: False, grace=0, every=1e9)
    visiting = Visiting()
    sessions.add("a", Stubborn())
    sessions.add("b", visiting)
    until(lambda: sessions.look() or visiting.closings == 2)


def test_a_session_has_one_visit() -> None:
    sessions = Sessions(lambda session: True, grace=1e9, every=0.01)
    first, second = Visiting(), Visiting()
    sessions.add("a", first)
    sessions.add("a", second)
    until(lambda: first.closings == 2)  # by the thread that looks after them
    assert second.closings == 0


def test_models_on_this_machine_are_listed_with_their_family(tmp_path: Path) -> None:
    index = (playground_model() / "model_index.json").read_text()
    for name, content in (("mine", index), ("other", '{"_class_name": "UnheardPipeline"}'), ("broken", "{")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").write_text(content)
    (tmp_path / "modular").mkdir()
    (tmp_path / "modular" / "modular_model_index.json").write_text('{"_class_name": "AnimaModularPipeline"}')
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}, tmp_path / "one.safetensors")
    shutil.copy(playground_lora("cat"), tmp_path / "cat.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"PK")
    found = catalog.models_in(tmp_path)
    assert [(Path(model.source).name, model.family) for model in found] == [
        ("mine", "Stable Diffusion 1.x and 2.x"),
        ("modular", "Anima"),
        ("one.safetensors", "Stable Diffusion 1.x and 2.x"),
    ]
    with pytest.raises(FileError, match="cannot be read"):
        catalog.models_in(tmp_path / "nowhere")


def test_models_in_the_hubs_cache_are_those_whose_weights_are_there(tmp_path: Path) -> None:
    for name in ("models--someone--whole", "models--someone--configurations", "models--alone", "datasets--a--b"):
        snapshot = tmp_path / name / "snapshots" / ("0" * 40)
        (snapshot / "unet").mkdir(parents=True)
        shutil.copy(playground_model() / "model_index.json", snapshot)
        if name != "models--someone--configurations":
            (snapshot / "unet" / "diffusion_pytorch_model.safetensors").touch()
    assert [model.source for model in catalog.cached_models(tmp_path)] == ["someone/whole"]
    assert catalog.cached_models(tmp_path / "none") == []


def test_a_lora_is_listed_by_its_header_alone(tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    Image.new("RGB", (300, 200), "red").save(buffer := BytesIO(), "PNG")
    uri = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    metadata = {"trigger": "sks", "class_word": "cat", "modelspec.thumbnail": uri}
    save_file({"unet.mid_block.x.lora_A.weight": torch.full((2, 4), torch.nan)}, path, metadata)
    lora = catalog.shown_lora(path)
    assert (lora.shown, lora.trigger, lora.class_word, lora.sha256) == ("mine.safetensors", "sks", "cat", "")
    assert Image.open(BytesIO(lora.thumbnail or b"")).size == (96, 64)
    Image.new("RGB", (50, 100), "blue").save(path.with_suffix(".png"))
    assert Image.open(BytesIO(catalog.shown_lora(path).thumbnail or b"")).size == (48, 96), "the image beside it"
    path.write_bytes(b"PK")
    with pytest.raises(LoraError, match="not a readable safetensors file"):
        catalog.shown_lora(path)


def test_images_in_metadata_are_shown_only_if_they_are_images() -> None:
    buffer = BytesIO()
    Image.new("RGB", (500, 300), "red").save(buffer, "JPEG")
    uri = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    found = store._embedded(uri)
    assert found is not None
    with Image.open(BytesIO(found)) as small:
        assert max(small.size) <= 96
    for wrong in (None, "", "javascript:alert(1)", "data:image/svg+xml;base64,PHN2Zz4=", "data:image/png;base64,!!"):
        assert store._embedded(wrong) is None


def record_of(run: Any, **sha256: str) -> Record:
    return Record(run=run, versions={}, sha256=sha256, machine=Machine(device="cpu", name="x", threads=1))


def test_loras_of_a_record_are_found_by_content_and_strangers_paths_are_not_followed(
    files: store.Store, tmp_path: Path
) -> None:
    cat = files.add_upload("cat.safetensors", opened(playground_lora("cat")))
    dog = tmp_path / "dog.safetensors"
    dog.write_bytes(playground_lora("dog").read_bytes())
    hashes = {"cat": cat.sha256, "dog": store.named(str(dog)).sha256, "passwords": "0" * 64, "bear": "0" * 64}
    concepts = (
        Concept(name="cat", lora="/gone/cat.safetensors"),
        Concept(name="dog", lora=str(dog)),
        Concept(name="passwords", lora="/etc/passwd"),
        BEAR,
    )
    (run,) = short(concepts=concepts, prompt="x", method=None).runs()
    found = store.located(record_of(run, **hashes), files.uploads, None, local=True)
    shown = {name: lora and lora.shown for name, lora in found.items()}
    assert shown == {"cat": "cat.safetensors", "dog": "dog.safetensors", "passwords": None, "bear": "bear"}
    elsewhere = store.located(record_of(run, **hashes), files.uploads, None, local=False)
    assert elsewhere["dog"] is None
    folder = store.located(record_of(run, **hashes), files.uploads, tmp_path, local=False)
    assert folder["dog"] is not None


def test_images_that_are_not_ours_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    with pytest.raises(FileError, match=r"^mine\.png has no record"):
        store.dropped("../mine.png", BytesIO(buffer.getvalue()))
    with pytest.raises(FileError, match=r"^mine\.png is not a readable PNG"):
        store.dropped("mine.png", BytesIO(b"GIF89a"))
    monkeypatch.setattr(store, "PNG_LIMIT", 4)
    with pytest.raises(FileError, match=r"^mine\.png is larger than 0 MB"):
        store.dropped("mine.png", BytesIO(b"GIF89a"))


# --- models and work ---


def finished(model: OpenModel, one: form.Form, **options: Any) -> work.Job:
    job = work.Job(model, one.runs(), record_attention=options.get("record_attention", False)).start()
    job.join(60)
    return job


def test_a_job_makes_what_python_makes_and_keeps_attention(model: OpenModel, tmp_path: Path) -> None:
    example = short(steps=2, seeds=(7, 8), size=(64, 64), boxed=False)
    job = finished(model, example, record_attention=True)
    assert (job.state, job.error, len(job.results), job.share) == ("done", "", 2, 1.0)
    result = job.results[1]
    run = example.runs()[1]
    plain = make(open_model(run), run)
    assert np.array_equal(np.asarray(result.made.image), np.asarray(plain.image))
    path = tmp_path / "result.png"
    path.write_bytes(png_bytes(result.made.image, result.made.record))
    assert read_record(path) == result.made.record
    attention = result.attention
    assert attention is not None
    assert attention.maps.shape == (2, 1, 2, 4, 4)
    for step in (None, 0):
        assert overlay.heat(result.made.image, attention, 1, step).size == (384, 384)
        assert overlay.masks(result.made.image, attention, step).size == (384, 384)


def test_page_command_and_python_text_give_the_same_image_also_beside_a_bystander_and_saving_memory(
    model: OpenModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    concepts = (
        BEAR.model_copy(update={"region": (0, 0, 32, 64)}),
        OTHER.model_copy(update={"region": (32, 0, 64, 64)}),
    )
    given = short(concepts=concepts, prompt="a xlo bear and a bear on grass", size=(64, 64), method="draft",
                  settings={"apart": 0.0})  # fmt: skip
    job = finished(model, given)
    assert job.error == ""
    (result,) = job.results
    monkeypatch.chdir(tmp_path)
    run, savers = export.portable(result.run, {}), (Saver.TILING, Saver.GRADIENT_CHECKPOINTING)
    Path("scene.yaml").write_text(export.scene_file(run.scene), encoding="utf-8")
    call(*shlex.split(export.command(run, savers))[1:], "--out", "cli")
    python = export.python(run, savers)
    assert python.count("pipe.load_concept(") == 1
    assert 'Concept(name="other bear", class_word="bear", region=(32, 0, 64, 64), role="bystander"),' in python
    names: dict[str, Any] = {}
    exec(compile(python, "it.py", "exec"), names)
    assert names["pipe"].vae.use_tiling
    assert names["pipe"].unet.is_gradient_checkpointing
    ours = np.asarray(result.made.image)
    assert np.array_equal(ours, np.asarray(read_pixels("cli/4.png")))
    assert np.array_equal(ours, np.asarray(read_pixels("result.png")))


def test_exports_name_what_saves_memory_on_their_device() -> None:
    (run,) = short(method="merge").runs()
    savers = (Saver.TILING, Saver.GRADIENT_CHECKPOINTING)
    assert export.command(run, savers).endswith("--save-memory tiling --save-memory gradient-checkpointing")
    moved = export.python(run.model_copy(update={"device": "cuda", "dtype": "float16"}), (Saver.MODEL_OFFLOAD,))
    assert "pipe.enable_model_cpu_offload()" in moved
    assert ".to(" not in moved


def test_the_exported_python_is_that_of_the_readme() -> None:
    cat = Concept(name="cat", lora="cat.safetensors", trigger="sks", class_word="cat", weight=1.0)
    dog = Concept(name="dog", lora="dog.safetensors", trigger="zwx", class_word="dog", weight=1.0)
    one = short(concepts=(cat, dog), prompt="a sks cat and a zwx dog on grass", boxed=False, method="clora")
    (run,) = one.runs()
    run = run.model_copy(update={"model": "stable-diffusion-v1-5/stable-diffusion-v1-5", "scheduler": "PNDMScheduler"})
    assert export.python(run, scheduler="PNDMScheduler") == (
        "import torch\n"
        "from lora_compose import ComposePipeline\n"
        "\n"
        'pipe = ComposePipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")\n'
        'pipe.load_concept("cat.safetensors", name="cat", trigger="sks", class_word="cat")\n'
        'pipe.load_concept("dog.safetensors", name="dog", trigger="zwx", class_word="dog")\n'
        "\n"
        "image = pipe(\n"
        '    prompt="a sks cat and a zwx dog on grass",\n'
        '    concepts=["cat", "dog"],\n'
        '    method="clora",\n'
        f"    **pipe.sized({SIZE}, {SIZE}),\n"
        "    num_inference_steps=1,\n"
        "    **pipe.guided(5.0, None),\n"
        "    generator=torch.Generator().manual_seed(4),\n"
        ").images[0]\n"
        'image.save("result.png")\n'
    )
    boxed = export.python(replace(one, boxed=True, concepts=(cat.model_copy(update={"region": (0, 0, 64, 64)}), dog),
                                  method="lora-composer", settings={"apart": 0.5}).runs()[0])  # fmt: skip
    assert 'Concept(name="cat", region=(0, 0, 64, 64))' in boxed
    assert "method=LoraComposer(apart=0.5)" in boxed


def test_files_that_are_merged_when_loaded_are_exported_as_such() -> None:
    files = ("cat.safetensors", f"playground:{STYLE}:0.7")
    concept = Concept(name="both", lora=files, merge="np", trigger="sks", weight=1.0)
    (run,) = short(concepts=(concept,), prompt="a sks cat", boxed=False, method="merge").runs()
    text = export.python(run)
    ast.parse(text)
    several = f"""["cat.safetensors", f"{{playground_lora({STYLE!r})}}:0.7"]"""
    assert f'pipe.load_concept({several}, name="both", merge="np", trigger="sks")' in text
    assert f"  - playground:{STYLE}:0.7\n" in export.scene_file(run.scene)


def test_what_saves_memory_is_kept_for_the_same_model_on_a_device_with_use_for_it() -> None:
    choice = ModelChoice("a", memory=(Saver.TILING, Saver.MODEL_OFFLOAD))
    assert choice.memory_for("a", None) == choice.memory_for("a", "cuda") == choice.memory
    assert choice.memory_for("a", "cpu") == (Saver.TILING,)
    assert choice.memory_for("b", "cuda") == ()


def test_exports_write_what_users_write_as_text(tmp_path: Path) -> None:
    name = """it's "x"; $(rm -rf /) \\"""
    concept = Concept(name=name, lora="cat.safetensors", trigger="sks", region=(0, 0, 64, 64))
    one = short(
        concepts=(concept,), prompt=f"{name}\n)]}}", method="draft", settings={"threshold": 0.5}, seeds=(2**63 - 1,)
    )
    (run,) = one.runs()
    written = {node.value for node in ast.walk(ast.parse(export.python(run))) if isinstance(node, ast.Constant)}
    assert {name, run.scene.prompt, run.seed, 0.5} <= written
    path = tmp_path / "scene.yaml"
    path.write_text(export.scene_file(run.scene), encoding="utf-8")
    assert read_scene(path).prompt == run.scene.prompt
    assert "--set threshold=0.5" in export.command(run)
    assert f"--seed {2**63 - 1}" in export.command(run)


def test_uploads_are_exported_under_their_owners_names(files: store.Store) -> None:
    lora = files.add_upload("my cat.safetensors", opened(playground_lora("cat")))
    (run,) = short(concepts=(lora.concept("cat"),), method="merge", prompt="a sks cat").runs()
    moved = export.portable(run, {lora.source: lora.shown})
    assert moved.scene.concepts[0].lora == "my cat.safetensors"
    text = export.scene_file(moved.scene, {lora.shown})
    assert "lora: my cat.safetensors\n" in text
    assert str(Path.cwd()) not in text


def test_a_job_tells_progress_and_what_it_looks_like_and_stops_within_a_step(model: OpenModel) -> None:
    long = short(steps=200, method="merge", size=(64, 64), boxed=False)
    job = work.Job(model, long.runs(), record_attention=False).start()
    until(lambda: job.preview is not None)
    assert 0 < job.share < 1
    assert (job.seconds_left or 0) > 0
    assert job.preview is not None
    assert job.preview.size == (64, 64)
    done = job.steps[0]
    job.stop()
    job.join(30)
    assert job.state == "stopped"
    assert job.steps[0] <= done + 2  # one may have ended meanwhile
    assert job.preview is None
    assert finished(model, replace(long, steps=1)).state == "done", "the model is usable"


def test_one_call_at_a_time_in_the_order_of_arrival(model: OpenModel) -> None:
    order: list[str] = []
    waited: list[int] = []
    hold = threading.Event()

    def call(name: str) -> None:
        with model.turn((), on_wait=waited.append):
            order.append(name)
            hold.wait(10)

    threads = []
    for name in "abc":
        threads.append(threading.Thread(target=call, args=(name,)))
        threads[-1].start()
        until(lambda: len(model._queue) == len(threads))
    until(lambda: {1, 2} <= set(waited))
    with pytest.raises(Busy), model.turn((), wait=False):
        pass
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped), model.turn((), stop=stop):
        pass
    hold.set()
    for thread in threads:
        thread.join(10)
    assert order == ["a", "b", "c"]
    assert not model.busy


def test_a_file_is_checked_while_the_model_works(model: OpenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is matched without the model, whose layers are then those of a call, and not read again by the next one."""
    bear = BEAR.model_copy(update={"lora": str(playground_lora("bear"))})
    with model.turn(()) as pipe:
        expected = pipe.resolve_concepts([bear.model_copy(update={"name": "alone"})])[0].factors
    with model.turn((), wait=False) as pipe, installed(pipe.unet, [expected.model]):
        pipe.library.recent.trim(0, keep=0)
        found = model.read(bear)
        assert model.busy
    assert found is not expected
    assert found.report == expected.report
    monkeypatch.setattr("lora_compose.pipelines.concepts.library.read_lora", None)
    with model.turn((bear,)) as pipe:
        assert load(pipe, bear).factors is found


def test_nothing_of_one_visitors_call_is_left_in_the_next(model: OpenModel) -> None:
    """Two sessions give different LoRAs the same name."""
    first, second = (
        short(
            concepts=(concept.model_copy(update={"name": "it"}),), prompt=f"a {concept.phrase}", method="merge",
            size=(64, 64),
        )
        for concept in (BEAR, ROBOT)
    )  # fmt: skip
    jobs = [work.Job(model, one.runs(), record_attention=False).start() for one in (first, second)]
    for job in jobs:
        job.join(60)
    (run,) = second.runs()
    alone = make(open_model(run), run)
    assert np.array_equal(np.asarray(jobs[1].results[0].made.image), np.asarray(alone.image))
    with model.turn(()) as pipe:
        assert dict(pipe.concepts) == {}


def test_a_lora_whose_file_has_changed_is_read_again(model: OpenModel, tmp_path: Path) -> None:
    """As after a training that replaces its own file; one that is gone stays as it was read."""
    file = tmp_path / "it.safetensors"
    concept = BEAR.model_copy(update={"name": "it", "lora": str(file)})
    hashes = []
    for source in ("bear", "robot", None):
        if source is None:
            file.unlink()
        else:
            shutil.copy(playground_lora(source), file)
        with model.turn((concept,)) as pipe:
            hashes += [read.sha256 for read in load(pipe, concept).files]
    assert hashes == [sha256_of(playground_lora(name)) for name in ("bear", "robot", "robot")]


def test_failures_are_reported_in_words(model: OpenModel) -> None:
    job = finished(model, short(prompt="nobody is named here", method="tara"))
    assert job.state == "failed"
    assert "is not in the prompt" in job.error
    gone = BEAR.model_copy(update={"lora": "/nowhere/x.safetensors"})
    assert "no file" in finished(model, short(concepts=(gone,), method="merge")).error


def test_a_shelf_holds_few_models_and_opens_each_once() -> None:
    open_models = OpenModels()
    first = open_models.open(ModelChoice(PLAYGROUND, device="cpu"))
    assert open_models.open(ModelChoice(PLAYGROUND, device="cpu")) is first
    tiled = open_models.open(ModelChoice(PLAYGROUND, device="cpu", memory=(Saver.TILING,)))
    assert tiled is not first
    with tiled.turn(()) as pipe:
        assert pipe.vae.use_tiling
    open_models.open(ModelChoice(PLAYGROUND, "bfloat16", "cpu"))
    assert open_models.open(ModelChoice(PLAYGROUND, device="cpu")) is not first
    with pytest.raises(ValueError, match="no model 'nothing here'"):
        open_models.open(ModelChoice("nothing here"))


def until(true: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


# --- overlays, scores, reports, launch ---


def test_overlays_show_the_right_concept_in_the_right_place() -> None:
    maps = torch.zeros(1, 1, 2, 2, 2)
    maps[0, 0, 0, 0, 0] = maps[0, 0, 1, 1, 1] = 1
    attention = Attention((0,), maps, maps > 0)
    image = Image.new("RGB", (128, 128), "white")
    pixels = np.asarray(overlay.heat(image, attention, 1, 0), np.int16)
    assert pixels[-20, -20].sum() > pixels[20, 20].sum()
    mask = np.asarray(overlay.masks(image, attention, None), np.int16)
    assert not np.array_equal(mask[20, 20], mask[-20, -20])
    assert np.array_equal(mask[20, -20], [255, 255, 255])
    outlined = np.asarray(overlay.outlined(image, [(0, 0, 64, 64), None]))
    assert not np.array_equal(outlined[0, 0], outlined[-1, -1])


def test_the_judge_scores_where_there_are_reference_images(judge: Judge) -> None:
    (run,) = short().runs()
    assert judge.judges(run)
    foreign = BEAR.model_copy(update={"lora": "/mine.safetensors"})
    assert not judge.judges(short(concepts=(foreign,)).runs()[0])
    assert not judge.judges(short(concepts=(), method=None, boxed=False).runs()[0])
    scores = judge.score(Image.new("RGB", (SIZE, SIZE), "white"), run)
    assert scores.keys() == {"bear", "robot"}
    assert {likeness.words for likeness in scores.values()} == {"not found"}


def test_the_loras_of_each_playground_are_judged(judge: Judge) -> None:
    (run,) = short().runs()
    flux = run.model_copy(update={"model": PLAYGROUND_FLUX})
    assert not judge.judges(flux), "the LoRAs are of the other"
    bear = BEAR.model_copy(update={"lora": f"{PLAYGROUND_FLUX}:bear"})
    assert judge.judges(flux.model_copy(update={"scene": run.scene.model_copy(update={"concepts": (bear,)})}))


def test_the_judge_scores_no_bystander(judge: Judge) -> None:
    (run,) = short(concepts=(BEAR, OTHER)).runs()
    assert judge.judges(run)
    assert judge.score(Image.new("RGB", (128, 128), "white"), run).keys() == {"bear"}
    assert not judge.judges(short(concepts=(OTHER,)).runs()[0])


def test_the_command_explains_itself_and_refuses_what_cannot_be() -> None:
    assert "--host" in call("ui", "--help").output
    assert "there is no folder" in call("ui", "--loras", "/nowhere", code=2).output


def test_only_this_machine_is_local() -> None:
    assert all(launch.is_local(host) for host in ("localhost", "127.0.0.1", "::1"))
    assert not any(launch.is_local(host) for host in ("0.0.0.0", "192.168.0.2", "example.org", ""))


def test_the_page_is_where_the_clone_has_it() -> None:
    assert launch.application().name == "ui.py"
    config = (launch.application().parent / ".streamlit" / "config.toml").read_text()
    assert 'address = "localhost"' in config
    assert "gatherUsageStats = false" in config
    assert "hideWelcomeMessage = true" in config, "Streamlit offers its developers things on the page"
    assert f"maxUploadSize = {store.UPLOAD_LIMIT // 2**20}" in config


def imported(path: Path) -> Iterator[str]:
    """What a module needs to be imported itself."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_compose_needs_no_streamlit_but_for_the_screen() -> None:
    package = launch.application().parent / "compose"
    inner = [path for path in package.rglob("*.py") if "screen" not in path.parts]
    assert len(inner) > 30
    outer = ("streamlit", "lora_compose.compose.page.screen")
    assert [path for path in inner if any(name.startswith(outer) for name in imported(path))] == []


def test_settings_of_constructors_can_be_shown() -> None:
    """The settings of `Tara.official()` and `LoraComposer.official()` can be set on the page."""
    for method, settings in (("tara", Tara.official()), ("lora-composer", LoraComposer.official())):
        shown = {control.name: control.shown(getattr(settings, control.name)) for control in controls.controls(method)}
        assert METHODS[method](**controls.changed(method, shown)) == settings


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (form.example().prompt, "An example is filled in"),
        ("", "Write a prompt and add LoRAs"),
        ("a cat", "Press Generate."),
    ],
)
def test_the_empty_canvas_tells_what_to_do_next(prompt: str, words: str) -> None:
    assert what_next(prompt).startswith(words)
