"""Our pipelines are called like diffusers', and hand arguments on by name, so that a new parameter shifts no other."""

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from types import FunctionType
from typing import Any

import pytest

from all_transformers import MODULAR
from components import seeded
from golden import PIPELINES, PROMPT, TRANSFORMERS, squares
from lora_compose import ComposePipeline
from transformer_families import TOKENS

FAMILIES = ("sd", "sdxl", *(name for name in TRANSFORMERS if name not in MODULAR))
"""Modular pipelines have no methods to hand arguments to."""
OF_OUR_OWN = {"concepts", "method", "control", "token_positions", "record_attention"}
OPENED = {"quantize"}
FROM_IMAGE = {"image", "mask_image", "strength", "padding_mask_crop", "paste_original"}
Class = type[ComposePipeline]


def plain_class(cls: Class) -> type:
    """diffusers' pipeline that one of ours extends."""
    return next(base for base in cls.__mro__ if base.__module__.startswith("diffusers.pipelines."))


def overridden(cls: Class) -> Iterator[str]:
    """Public methods of diffusers' pipeline in whose place there is one of ours."""
    ours = {name for base in cls.__mro__ if base.__module__.startswith("lora_compose") for name in vars(base)}
    for name in sorted(ours):
        theirs = getattr(plain_class(cls), name, None)
        method = inspect.isfunction(theirs) or inspect.ismethod(theirs)  # no call of the class itself
        if (name == "__call__" or not name.startswith("_")) and method:
            yield name


def cases() -> Iterator[Any]:
    for cls in ComposePipeline.families:
        for name in overridden(cls):
            yield pytest.param(cls, name, id=f"{cls.family}-{name}")


def parameters(cls: type, name: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(getattr(cls, name)).parameters


def positional(found: Mapping[str, inspect.Parameter]) -> list[str]:
    return [name for name, one in found.items() if one.kind is one.POSITIONAL_OR_KEYWORD]


@pytest.mark.parametrize(("cls", "name"), list(cases()))
def test_the_signature_is_that_of_diffusers_and_more(cls, name):
    ours, theirs = parameters(cls, name), parameters(plain_class(cls), name)
    assert positional(ours) == positional(theirs)
    for parameter in positional(theirs):
        default = ours[parameter].default
        if (name, parameter) == ("__call__", "callback_on_step_end_tensor_inputs"):
            default = list(default)
        assert default == theirs[parameter].default, parameter
    added = {one.name for one in ours.values() if one.kind is one.KEYWORD_ONLY} - theirs.keys()
    inpainting = {"image_reference"} if cls.family == "FLUX.2-klein" else set()  # of its diffusers' inpainting pipeline
    of_our_own = {
        "__call__": OF_OUR_OWN | FROM_IMAGE | inpainting,
        "from_pretrained": OPENED,
        "from_single_file": OPENED,
    }
    assert added == of_our_own.get(name, set()) - theirs.keys()


def test_the_call_and_what_opens_and_saves_are_compared():
    assert {
        "__call__",
        "encode_prompt",
        "from_pretrained",
        "from_single_file",
        "from_pipe",
        "save_pretrained",
        "to",
    } == {name for cls in ComposePipeline.families for name in overridden(cls)}


class Watch:
    """Wraps the methods of some of diffusers' classes, and sees which of them our code gives arguments by position.

    The first argument may be: what comes before it is a new method. Any other is shifted by a parameter that is new.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, classes: Iterable[type]) -> None:
        self.called: set[str] = set()
        self.shifted: set[str] = set()
        for cls in classes:
            for name, method in vars(cls).items():
                if isinstance(method, FunctionType) and name != "__init__":
                    monkeypatch.setattr(cls, name, self._watched(method, f"{cls.__name__}.{name}"))

    def _watched(self, method: Callable[..., Any], name: str) -> Callable[..., Any]:
        @wraps(method)
        def called(*args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1)
            if caller.f_globals["__name__"].startswith("lora_compose"):
                self.called.add(name)
                as_given = caller.f_code.co_flags & inspect.CO_VARARGS  # an override that passes on what it is given
                if len(args) > 2 and not as_given:  # itself and the first
                    self.shifted.add(name)
            return method(*args, **kwargs)

        return called


def run(family: str, **arguments: Any) -> None:
    pipe = PIPELINES[family]()
    given: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 2, "height": 128, "width": 128}
    given |= {"output_type": "np", "generator": seeded(0)}
    if family in TRANSFORMERS:
        given |= {"max_sequence_length": TOKENS, **TRANSFORMERS[family].guided}
    pipe(**given | arguments)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_without_concepts_hands_its_arguments_on_by_name(family, monkeypatch):
    plain = plain_class(type(PIPELINES[family]()))
    watch = Watch(monkeypatch, [plain])
    run(family)
    assert f"{plain.__name__}.__call__" in watch.called
    assert watch.shifted == set()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_with_concepts_uses_methods_of_diffusers_by_name(family, monkeypatch):
    cls: Any = type(PIPELINES[family]())
    tasks = {False: cls.image_to_image, True: cls.inpainting}
    classes = [plain_class(cls), *(task.pipeline for task in tasks.values() if task is not None)]
    watch = Watch(monkeypatch, classes)
    run(family, concepts=["cat", "dog"], method="merge")
    for inpaints, task in tasks.items():
        if task is not None:
            mask = {"mask_image": (32, 32, 128, 112)} if inpaints else {}
            run(family, concepts=["cat"], method="merge", image=squares(), strength=0.6, **mask)
            assert any(name.startswith(f"{task.pipeline.__name__}.") for name in watch.called)
    assert watch.shifted == set()
