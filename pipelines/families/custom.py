"""Models of every family through `DiffusionPipeline.from_pretrained(..., custom_pipeline=FOLDER)`.

diffusers takes one class from the folder's `pipeline.py` (`assets/custom_pipeline`), reads from its signature which
components a model may have, loads them, and constructs the class.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import DiffusionPipeline

from lora_compose.pipelines.families.base import ComposePipeline


def _parameters(family: type[ComposePipeline]) -> dict[str, inspect.Parameter]:
    return {name: it for name, it in inspect.signature(family.__init__).parameters.items() if name != "self"}


def _needed(family: type[ComposePipeline]) -> set[str]:
    """The components without which a family's pipeline cannot be constructed."""
    required = {name for name, it in _parameters(family).items() if it.default is inspect.Parameter.empty}
    return required - set(family._optional_components)


_CONCEPTS = inspect.Parameter(
    "concepts", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Mapping[str, Any] | Sequence[Any] | str | None
)


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
    return inspect.Signature([inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY), *joined, _CONCEPTS])


class CustomComposePipeline(DiffusionPipeline):
    """The class that diffusers constructs for a custom pipeline; the result is the pipeline of the model's family."""

    _optional_components = _components()  # which of them a model needs depends on its family

    def __new__(cls, *, concepts: Any = None, **parts: Any) -> ComposePipeline:
        """The pipeline of the family whose components these are.

        Args:
            concepts: What the pipeline's `add_concepts` takes, for programs that pass plain JSON to `from_pretrained`
                and have no other way to name files: calls, and tags in prompts, then name them.
            parts: Components, None for those that the model does not have, and settings.

        Raises:
            ValueError: For model families that are not supported, and for models without a component that they need.
            LoraError: If there is no file of one of the concepts.
        """
        given = {name: part for name, part in parts.items() if part is not None}
        config = {name: (type(part).__module__, type(part).__name__) for name, part in given.items()}
        family: Any = ComposePipeline.family_of(config)
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
