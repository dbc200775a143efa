"""A call can be planned without being run: what it would do is a value, and nothing is changed."""

import logging
import sys
import time
from functools import wraps
from typing import Any

import pytest
from diffusers import EulerAncestralDiscreteScheduler

from all_transformers import TRANSFORMERS
from golden import BOXES, PIPELINES, PROMPT
from lora_compose import Concept
from lora_compose.attention import Claim
from lora_compose.pipelines.formats.models import models_of
from lora_compose.pipelines.support.notes import logged
from transformer_families import TOKENS

UNETS = ("sd", "sdxl")
FAMILIES = (*UNETS, *TRANSFORMERS)
METHODS = ("merge", "tara", "regional", "switch", "composite", "lora-composer", "clora", "draft", "freefuse")


def arguments(family: str, method: str | None = "merge", **more: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 3, "height": 128, "width": 128}
    if family in TRANSFORMERS:
        given |= {"max_sequence_length": TOKENS, **TRANSFORMERS[family].guided}
    boxed = method in ("regional", "lora-composer")
    concepts = [Concept(name=name, region=box if boxed else None) for name, box in BOXES.items()]
    return {**given, "concepts": concepts, "method": method, **more}


def state(pipe: Any) -> tuple:
    """What a call changes: attributes, the scheduler, modules and weights of the model, and what is kept."""
    modules = [(name, id(module)) for model in models_of(pipe) for name, module in model.named_modules()]
    versions = [(id(one), one._version) for model in models_of(pipe) for one in model.parameters()]
    attributes = {name: id(value) for name, value in vars(pipe).items()}
    scheduler = {name: id(value) for name, value in vars(pipe.scheduler).items()}
    return attributes, scheduler, modules, versions, len(logged), dict(pipe.concepts)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_says_what_the_call_will_do_and_changes_nothing(family, caplog):
    pipe = PIPELINES[family]()
    given = arguments(family, "tara")
    first = pipe(**given | {"num_inference_steps": 1}, output_type="latent")  # what calls keep is there
    logged.clear()
    caplog.clear()
    before = state(pipe)
    plan = pipe.plan(**given)
    assert plan.cost.rows_forward > 0
    assert state(pipe) == before
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    assert any("was trained with TARA" in warning for warning in plan.warnings)
    assert (plan.method, plan.choice.reason, plan.steps) == ("tara", "it was asked for", 3)
    assert (plan.image_size, plan.images) == ((128, 128), 1)
    assert [planned.concept.name for planned in plan.concepts] == ["cat", "dog"]
    cat, dog = (planned.trigger[0] for planned in plan.concepts)
    assert max(cat) < min(dog)
    assert (first.method, first.method_reason) == (plan.method, plan.choice.reason)


@pytest.mark.parametrize(
    ("family", "method"),
    [
        *(("sd", method) for method in METHODS),
        ("flux", "regional"),
        ("flux", "draft"),
        pytest.param("flux", "composite", marks=pytest.mark.slow),
    ],
)
def test_the_predicted_rows_are_those_that_are_run(family, method):
    pipe, given = PIPELINES[family](), arguments(family, method)
    predicted, run = pipe.plan(**given).cost, pipe(**given, output_type="latent").cost
    assert (predicted.rows_forward, predicted.rows_stopped, predicted.rows_backward) == (
        run.rows_forward, run.rows_stopped, run.rows_backward,
    )  # fmt: skip


def test_counting_the_steps_of_a_draft_warns_of_nothing(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    pipe = PIPELINES["sd"]()
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    assert pipe.plan(**arguments("sd", "draft", num_inference_steps=25)).cost.rows_forward > 50
    assert not [record for record in caplog.records if record.name.startswith("diffusers.schedulers")]


@pytest.mark.parametrize("method", ["clora", "lora-composer"])
def test_what_a_model_cannot_do_is_said_at_once_and_in_words(method):
    pipe, given = PIPELINES["flux"](), arguments("flux", method)
    pipe.plan(**arguments("flux"))
    before, start = state(pipe), time.process_time()
    with pytest.raises(ValueError, match="UNets and Anima have; use draft") as planned:
        pipe.plan(**given)
    assert time.process_time() - start < 0.1
    assert state(pipe) == before
    with pytest.raises(ValueError, match="use draft") as called:
        pipe(**given)
    assert str(called.value) == str(planned.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt": "a sks cat"}, {"num_inference_steps": 0}, {"concepts": ["fox"]}, {"width": 127}, {"method": "none"},
        {"record_attention": [7]}, {"strength": 0.5},
    ],
    ids=str,
)  # fmt: skip
def test_a_plan_is_refused_as_the_call_is(wrong):
    pipe = PIPELINES["sd"]()
    given = arguments("sd", **wrong) if "method" not in wrong else {**arguments("sd"), **wrong}
    messages = []
    for ask in (pipe.plan, pipe):
        with pytest.raises(ValueError, match=r"\w") as refused:
            ask(**given)
        messages.append(str(refused.value))
    assert messages[0] == messages[1]


def test_a_call_without_concepts_has_no_plan():
    with pytest.raises(ValueError, match="a call without concepts is diffusers' own"):
        PIPELINES["sd"]().plan(PROMPT)


def test_a_class_that_overrides_the_call_is_planned_as_it_would_be_run():
    pipe = PIPELINES["sd"]()

    class Quick(type(pipe)):
        def __call__(self, *args, steps=2, **kwargs):
            return super().__call__(*args, num_inference_steps=steps, **kwargs).images[0]

    given = {name: value for name, value in arguments("sd").items() if name != "num_inference_steps"}
    own = Quick(**pipe.components)
    for name in ("cat", "dog"):
        own.library.loaded[name] = pipe.library.loaded[name]
    assert own.plan(**given).steps == 2
    assert own.plan(**given, steps=5).steps == 5
    assert (
        own(**given, output_type="latent").shape[-1] == pipe(**arguments("sd"), output_type="latent").images.shape[-1]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_runs_no_line_of_the_call(family):
    pipe, called = PIPELINES[family](), []

    def watch(frame, event, argument):
        if event == "call" and frame.f_code is type(pipe).__call__.__code__:
            called.append(frame)

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        pipe.plan(**arguments(family))
    finally:
        sys.setprofile(before)
    assert not called


def test_a_class_that_wraps_the_call_is_planned_as_it_would_be_run():
    pipe = PIPELINES["sd"]()

    class Wrapped(type(pipe)):
        @wraps(type(pipe).__call__)
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs | {"num_inference_steps": 2})

    own = Wrapped(**pipe.components)
    own.library.loaded.update(pipe.library.loaded)
    assert own.plan(**arguments("sd")).steps == 2


def test_a_plan_is_made_while_a_call_has_the_model():
    pipe = PIPELINES["sd"]()
    claim = Claim(models_of(pipe), "compose")
    claim.take()
    try:
        assert pipe.plan(**arguments("sd")).method == "merge"
    finally:
        claim.end()


def test_the_reason_and_the_regions_are_values():
    plan = PIPELINES["sd"]().plan(**{**arguments("sd", "regional"), "method": None})
    every = "every concept has a region"
    assert (plan.method, plan.choice.reason) == (
        "draft",
        f"{every}, and the prompt names each by trigger and class word",
    )
    assert plan.regions == BOXES


def test_each_prompt_has_the_words_of_its_own_concepts():
    given = {**arguments("sd"), "prompt": ["a sks cat", "a zwx dog"], "concepts": [["cat"], ["dog"]]}
    cat, dog = PIPELINES["sd"]().plan(**given).concepts
    assert (cat.trigger, dog.trigger) == ({0: (2,)}, {1: (2,)})
