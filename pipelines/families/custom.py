"""Models of every family through `DiffusionPipeline.from_pretrained(..., custom_pipeline=FOLDER)`.

diffusers takes one class from the folder's `pipeline.py` (`assets/custom_pipeline`), reads from its signature which
components a model may have, loads them, and constructs the class.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import DiffusionPipeline

from lora_compose.pipelines.families.base import ComposePipeline
from lora_compose.pipelines.support.notes import warn


def _parameters(family: type[ComposePipeline]) -> dict[str, inspect.Parameter]:
    return {name: it for name, it in inspect.signature(family.__init__).parameters.items() if name != "self"}


def _needed(family: type[ComposePipeline]) -> set[str]:
    """The components without which a family's pipeline cannot be constructed."""
    required = {name for name, it in _parameters(family).items() if it.default is inspect.Parameter.empty}
    return required - set(family._optional_components)


_CONCEPTS = inspect.Parameter(
    "concepts", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Mapping[str, Any] | Sequence[Any] | str | None
)
_MODEL_CLASS = inspect.Parameter("model_class", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=str | None)


def _components() -> list[str]:
    return sorted({name for each in ComposePipeline.families for name in (*_needed(each), *each._optional_components)})


def _joined_signature() -> inspect.Signature:
    """The parameters of all families. Components have no default, so that diffusers loads those that a model has."""
    components = _components()
    parameters = {name: it for family in ComposePipeline.families for name, it in _parameters(family).items()}
    joined = [
        inspect.Parameter(name, it.KEYWORD_ONLY, default=it.empty if name in components else it.default)
        for name, it in parameters.items()
    ]
    return inspect.Signature(
        [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY), *joined, _CONCEPTS, _MODEL_CLASS]
    )


def _family(given: Mapping[str, Any], model_class: str | None) -> type[ComposePipeline]:
    """The family of a model with these components and settings; the first of those that nothing tells apart."""
    config = {name: (type(part).__module__, type(part).__name__) for name, part in given.items()}
    config |= {"_class_name": model_class}
    fitting = [
        family for family in ComposePipeline.families
        if family.opens(config) and given.keys() <= _parameters(family).keys()
    ]  # fmt: skip
    if model_class is None and len(fitting) > 1:
        first, *others = fitting
        names = " or ".join(f'"model_class": "{family.__name__}"' for family in others)
        warn(
            f"nothing in this model says whether it is {' or '.join(family.family for family in fitting)}; it opens as "
            f"{first.family}. If it is another, write {names} into its model_index.json"
        )
    return fitting[0] if fitting else ComposePipeline.family_of(config)


class CustomComposePipeline(DiffusionPipeline):
    """The class that diffusers constructs for a custom pipeline; the result is the pipeline of the model's family."""

    _optional_components = _components()  # which of them a model needs depends on its family

    @classmethod
    def extract_init_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """As in diffusers, with the model's own class, which it leaves out: some families have the same components."""
        name = config_dict.get("_class_name")
        if isinstance(name, str) and name != cls.__name__:
            config_dict = {"model_class": name, **config_dict}
        return super().extract_init_dict(config_dict, **kwargs)

    def __new__(cls, *, concepts: Any = None, model_class: str | None = None, **parts: Any) -> ComposePipeline:
        """The pipeline of the family whose components these are.

        Args:
            concepts: What the pipeline's `add_concepts` takes, for programs that pass plain JSON to `from_pretrained`
                and have no other way to name files: calls, and tags in prompts, then name them.
            model_class: diffusers' pipeline for the model: `_class_name` of its model_index.json, if that names another
                than this class; otherwise `model_class` there.
            parts: Components, None for those that the model does not have, and settings.

        Raises:
            ValueError: For model families that are not supported, and for models without a component that they need.
            LoraError: If there is no file of one of the concepts.
        """
        given = {name: part for name, part in parts.items() if part is not None}
        family: Any = _family(given, model_class)
        missing = _needed(family) - given.keys()
        if missing:
            raise ValueError(f"the model has no {', '.join(sorted(missing))}, which {family.family} needs")
        pipe = family(**{name: parts[name] for name in _parameters(family) if name in parts})
        if concepts:
            pipe.add_concepts(concepts)
        return pipe

    def __init__(self, **parts: Any) -> None:
        """Never runs, because `__new__` returns an object of another class. diffusers reads its signature."""

    __init__.__signature__ = _joined_signature()  # pyright: ignore[reportFunctionMemberAccess]
