"""A call of a pipeline claims the models that it uses, from its first line to its last."""

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any, ParamSpec, TypeVar

from torch import nn

from lora_compose.attention import Claim
from lora_compose.pipelines.call import no_concepts
from lora_compose.pipelines.concepts.loading import TEXT_ENCODERS
from lora_compose.pipelines.concepts.tags import has_tags

P = ParamSpec("P")
R = TypeVar("R")


def claims_models(call: Callable[P, R]) -> Callable[P, R]:
    """Makes a family's `__call__` claim its denoiser and text encoders: to change them, if it has concepts.

    The call raises RuntimeError if another call changes one of these models, or reads one that this call would change.
    """
    place = list(signature(call).parameters).index("prompt")

    @wraps(call)
    def claiming(*args: P.args, **kwargs: P.kwargs) -> R:
        pipe: Any = args[0]
        prompt = args[place] if len(args) > place else kwargs.get("prompt")
        ours = kwargs.get("mask_image") is not None and not pipe.inpaints_as_diffusers
        claim = Claim(models_of(pipe), "compose" if ours or _composes(prompt, kwargs.get("concepts")) else "read")
        try:
            try:
                claim.take()
                return call(*args, **kwargs)
            finally:
                claim.end()
        finally:
            claim.end()

    return claiming


def _composes(prompt: Any, concepts: Any) -> bool:
    texts = prompt if isinstance(prompt, list | tuple) else [prompt]
    return not no_concepts(concepts) or any(has_tags(text) for text in texts if isinstance(text, str))


def models_of(pipe: Any) -> list[nn.Module]:
    """The models of a pipeline that calls with concepts change."""
    every = [pipe.model, *(getattr(pipe, name, None) for name in TEXT_ENCODERS)]
    return [model for model in every if isinstance(model, nn.Module)]
