"""Our pipelines are called like diffusers', and hand arguments on by name, so that a new parameter shifts no other."""

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from types import FunctionType
from typing import Any, get_type_hints

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.modular_pipelines.anima.encoders import AnimaTextEncoderStep
from diffusers.modular_pipelines.flux3.encoders import Flux3TextEncoderStep
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from diffusers.utils import BaseOutput

from all_transformers import EVERY, MODULAR
from components import seeded
from composing import composer_of, lora_file
from golden import PROMPT, squares
from lora_compose import ComposePipeline
from lora_compose.pipelines.calls.front import READ, front
from lora_compose.pipelines.families.modular import ModularFamilyPipeline
from pairs import slow_but
from transformer_families import TOKENS, shared_pipeline

FAMILIES = ("sd", "sdxl", *(name for name in EVERY if name not in (*MODULAR, "qwen-image-edit")))
"""Modular pipelines have no methods to hand arguments to; of Qwen-Image-Edit-Plus one model is enough."""
FURTHER: Mapping[str, Mapping[str, Any]] = {
    "flux2-dev": {"image": squares()}, "kontext": {"image": squares(), "_auto_resize": False},
    "qwen-image-edit-2511": {"image": squares()},
}  # fmt: skip
"""Arguments of every call of a family: the reference images that it is made for."""
TRAINED = [name for name in FAMILIES[2:] if "text_encoder_out_layers" not in EVERY[name].unguided]
"""Families whose small pipelines have the layers of the text encoder that training reads."""
BLOCKS = {"anima": AnimaTextEncoderStep, "flux3": Flux3TextEncoderStep}
"""Blocks of modular pipelines whose methods are used."""
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
    inpaints = cls.family in ("FLUX.2-klein", "FLUX.1 Kontext")
    inpainting = {"image_reference"} if inpaints else set()  # of diffusers' pipeline for that
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


@pytest.mark.parametrize("cls", ComposePipeline.families, ids=lambda cls: cls.family)
def test_calls_with_concepts_read_every_argument_of_diffusers_or_refuse_it(cls):
    if issubclass(cls, ModularFamilyPipeline):  # whose arguments are our own
        return
    named = {*positional(parameters(cls, "__call__"))} - READ
    assert {*cls.reads} == {name for name in named if "ip_adapter" not in name or cls.reads_image_prompts}


def newer(**defaults: Any) -> Any:
    """A pipeline whose `__call__` has further arguments in a newer diffusers."""
    pipe = composer_of("sd")
    cls: Any = type(pipe)
    *theirs, kwargs = parameters(StableDiffusionPipeline, "__call__").values()
    more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=it) for name, it in defaults.items()]

    def of_newer() -> None:
        """Stands for `__call__` of the newer diffusers, of which only the signature is used."""

    of_newer.__dict__["__signature__"] = inspect.Signature([*theirs, *more, kwargs])

    class Newer(cls):
        __call__ = front(of_newer)(cls.__call__.__wrapped__)

    made = Newer(**pipe.components, requires_safety_checker=False)
    made.load_concept(lora_file("sd", "cat"), "cat")
    return made


@pytest.mark.parametrize("name", ["sharpness", "true_cfg_scale", "max_sequence_length"])
def test_an_argument_that_a_newer_diffusers_has_is_refused_with_concepts(name):
    """Also where another family reads an argument of that name."""
    assert name == "sharpness" or any(name in getattr(cls, "reads", ()) for cls in ComposePipeline.families)
    with pytest.raises(ValueError, match=rf"^{name} cannot be combined with concepts; leave it out$"):
        newer(**{name: None}).plan(PROMPT, concepts=["cat"], **{name: 1})


@pytest.mark.parametrize(
    ("default", "given"), [(0.5, float("0.5")), ("auto", "".join(["au", "to"])), ([1, (2.0, "x")], [1, (2.0, "x")])]
)
def test_the_default_of_an_argument_of_a_newer_diffusers_may_be_given(default, given):
    assert given is not default
    pipe = newer(sharpness=default)
    assert pipe.plan(PROMPT, concepts=["cat"], sharpness=given).method == pipe.plan(PROMPT, concepts=["cat"]).method


@pytest.mark.parametrize(
    ("default", "given"), [(1, True), (0.5, torch.full([2], 0.5)), ([0.5], [torch.full([2], 0.5)]), ([1], [1, 1])]
)
def test_what_only_resembles_the_default_is_refused(default, given):
    with pytest.raises(ValueError, match=r"^sharpness cannot be combined with concepts; leave it out$"):
        newer(sharpness=default).plan(PROMPT, concepts=["cat"], sharpness=given)


@pytest.mark.parametrize("cls", ComposePipeline.families, ids=lambda cls: cls.family)
def test_types_are_those_of_diffusers_and_of_our_arguments(cls):
    found, of_our_own = get_type_hints(cls.__call__), get_type_hints(ComposePipeline.__call__)
    assert {name: found[name] for name in OF_OUR_OWN} == {name: of_our_own[name] for name in OF_OUR_OWN}
    assert found["return"] == inspect.signature(cls.__call__).return_annotation == BaseOutput | tuple
    assert found["padding_mask_crop"] == int | None
    if not issubclass(cls, ModularFamilyPipeline):
        theirs = {name: it for name, it in get_type_hints(plain_class(cls).__call__).items() if name != "return"}
        assert theirs.items() <= found.items()


class Watch:
    """Wraps the methods of some of diffusers' classes, and sees which of them our code gives arguments by position.

    The first argument may be: what comes before it is a new method. Any other is shifted by a parameter that is new.
    Processors of images are watched as well.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, classes: Iterable[type]) -> None:
        self.called: set[str] = set()
        self.shifted: set[str] = set()
        for cls in (*classes, VaeImageProcessor, Flux2ImageProcessor):
            for name, method in [*vars(cls).items()]:
                called = f"{cls.__name__}.{name}"
                if isinstance(method, FunctionType) and name != "__init__":
                    monkeypatch.setattr(cls, name, self._watched(method, called, most=2))  # itself and the first
                elif isinstance(method, staticmethod):
                    monkeypatch.setattr(cls, name, staticmethod(self._watched(method.__func__, called, most=1)))

    def _watched(self, method: Callable[..., Any], name: str, most: int) -> Callable[..., Any]:
        @wraps(method)
        def called(*args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1)
            if caller.f_globals["__name__"].startswith("lora_compose"):
                self.called.add(name)
                as_given = caller.f_code.co_flags & inspect.CO_VARARGS  # an override that passes on what it is given
                if len(args) > most and not as_given:
                    self.shifted.add(name)
            return method(*args, **kwargs)

        return called


def pipeline(family: str) -> Any:
    """A small pipeline with a cat and a dog."""
    return shared_pipeline(EVERY[family]) if family in EVERY else composer_of(family, whole=True)


def run(family: str, **arguments: Any) -> None:
    given: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 1, "height": 128, "width": 128}
    given |= {"output_type": "np", "generator": seeded(0), **FURTHER.get(family, {})}
    if family in EVERY:
        given |= {"max_sequence_length": TOKENS, **(EVERY[family].guided or EVERY[family].unguided)}
    pipeline(family)(**given | arguments)


@pytest.mark.parametrize("family", slow_but(("sd", "sdxl", "flux", "flux2", "qwen-image", "kontext"), FAMILIES))
def test_a_call_without_concepts_hands_its_arguments_on_by_name(family, monkeypatch):
    plain = plain_class(type(pipeline(family)))
    watch = Watch(monkeypatch, [plain])
    run(family)
    assert f"{plain.__name__}.__call__" in watch.called
    assert watch.shifted == set()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_with_concepts_uses_methods_of_diffusers_by_name(family, monkeypatch):
    cls: Any = type(pipeline(family))
    tasks = {False: cls.image_to_image, True: cls.inpainting}
    classes = [plain_class(cls), *(task.pipeline for task in tasks.values() if task is not None)]
    watch = Watch(monkeypatch, classes)
    run(family, concepts=["cat", "dog"], method="merge")
    for inpaints, task in tasks.items():
        if task is not None:
            mask = {"mask_image": (32, 32, 128, 112)} if inpaints else {}
            run(family, concepts=["cat"], method="merge", image=squares(), strength=1.0, **mask)
            assert any(name.startswith(f"{task.pipeline.__name__}.") for name in watch.called)
    assert watch.shifted == set()


@pytest.mark.parametrize("family", BLOCKS)
def test_a_call_with_concepts_uses_blocks_of_modular_pipelines_by_name(family, monkeypatch):
    watch = Watch(monkeypatch, [BLOCKS[family]])
    run(family, concepts=["cat", "dog"], method="merge")
    assert any(name.startswith(f"{BLOCKS[family].__name__}.") for name in watch.called)
    assert watch.shifted == set()


@pytest.mark.parametrize("family", TRAINED)
def test_texts_for_training_are_read_by_name(family, monkeypatch):
    pipe = pipeline(family)
    watch = Watch(monkeypatch, [plain_class(type(pipe))])
    pipe.read_beside([PROMPT], [squares()]) if family in FURTHER else pipe.read_texts([PROMPT])
    assert watch.called
    assert watch.shifted == set()
