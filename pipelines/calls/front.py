"""The front of a call, the same for all families: diffusers' arguments become a `Request`, to be planned or run."""

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from inspect import signature
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from lora_compose.attention import Claim
from lora_compose.pipelines.calls.call import (
    Call,
    Callback,
    Composition,
    GivenPrompts,
    ImageSize,
    Sampling,
    no_concepts,
    tensors_for,
)
from lora_compose.pipelines.concepts.tags import has_tags
from lora_compose.pipelines.denoising.guidance import Guider
from lora_compose.pipelines.denoising.process import Process
from lora_compose.pipelines.formats.models import models_of
from lora_compose.pipelines.images.from_image import FromImage
from lora_compose.pipelines.text.encoder import FamilyEncoder


class Composes(Protocol):
    """A family's pipeline, as the front of its calls needs it."""

    @property
    def inpaints_as_diffusers(self) -> bool:
        """Whether diffusers' pipeline can inpaint with this model; otherwise our own loop does."""
        ...

    def run_request(self, request: "Request") -> Any:
        """Runs a call with concepts."""
        ...


P = ParamSpec("P")
Pipeline = TypeVar("Pipeline", bound=Composes)

OF_OURS = ("concepts", "method", "control", "token_positions", "record_attention")
"""Arguments for concepts."""

OF_START_IMAGE = ("image", "mask_image", "strength", "padding_mask_crop", "paste_original")
"""Arguments for calls that start from an image."""


@dataclass(frozen=True)
class Request:
    """A call with concepts that has been made of diffusers' arguments; nothing has been run or changed.

    Attributes:
        encode: Encodes prompts with the text encoders of the family.
        decode: From the final latents and the finished process to the images, and what else diffusers returns.
        named: Whether the results have names: `return_dict`.
    """

    call: Call
    encode: FamilyEncoder
    decode: Callable[[Tensor, Process], Sequence[Any]]
    named: bool


@dataclass(frozen=True)
class Plain:
    """A call without concepts, which is diffusers' own."""

    run: Callable[[], Any]


@dataclass(frozen=True)
class Begun:
    """What all families ask of the arguments of a call.

    Attributes:
        prompt: Without tags; with `concepts="auto"`, with the triggers of the concepts that it names.
        started: When the call began, by `time.perf_counter()`.
        plain: The call itself, if it is diffusers' own.
    """

    prompt: Any
    composition: Composition
    start: FromImage | None
    started: float
    plain: Plain | None

    def call(
        self,
        given: Mapping[str, Any],
        prompts: GivenPrompts,
        size: tuple[int, int],
        per_prompt: int,
        guider: Guider,
        **fields: Any,
    ) -> Call:
        """A call with concepts.

        Args:
            given: The arguments of `__call__`, by name.
            size: Width and height in pixels.
            per_prompt: Images of each prompt.
            fields: Further fields of the call.
        """
        sampling = Sampling(
            given["num_inference_steps"], given.get("timesteps"), given.get("sigmas"), given.get("denoising_end"),
            given["generator"], given.get("latents"), given.get("eta", 0.0), guider,
        )  # fmt: skip
        function = given["callback_on_step_end"]
        callback = Callback(function, tensors_for(function, given["callback_on_step_end_tensor_inputs"]))
        size_of_images = ImageSize(*size, per_prompt)
        return Call(self.composition, prompts, size_of_images, sampling, callback, self.started, **fields)


class _Answer(BaseException):
    """Carries what `front` was asked for through whatever a class of the user's has put around its call."""

    def __init__(self, made: Request | Plain) -> None:
        super().__init__()
        self.made = made


_asking: ContextVar[bool] = ContextVar("a call is planned, not run", default=False)


def front(
    make: Callable[Concatenate[Pipeline, P], Request | Plain],
) -> Callable[Concatenate[Pipeline, P], BaseOutput | tuple]:
    """Makes a family's `__call__` of the function that makes its requests; the arguments are the same.

    A call claims the denoiser and the text encoders from its first line to its last: to change them, if it has
    concepts. It raises RuntimeError if another call changes one of these models, or reads one that it would change.
    """
    place = list(signature(make).parameters).index("prompt") - 1  # after `self`

    @wraps(make)
    def call(pipe: Pipeline, *args: P.args, **kwargs: P.kwargs) -> BaseOutput | tuple:
        if _asking.get():
            raise _Answer(make(pipe, *args, **kwargs))
        prompt = args[place] if len(args) > place else kwargs.get("prompt")
        ours = kwargs.get("mask_image") is not None and not pipe.inpaints_as_diffusers
        claim = Claim(models_of(pipe), "compose" if ours or _composes(prompt, kwargs.get("concepts")) else "read")
        try:
            try:
                claim.take()
                with torch.no_grad():
                    request = make(pipe, *args, **kwargs)
                    return request.run() if isinstance(request, Plain) else pipe.run_request(request)
            finally:
                claim.end()
        finally:
            claim.end()

    return call


def request_of(pipe: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Request:
    """The request that a call of a pipeline with these arguments would run.

    Raises:
        ValueError: For arguments that do not fit together, and calls without concepts.
    """
    token = _asking.set(True)
    try:
        pipe(*args, **kwargs)
        raise TypeError(f"{type(pipe).__name__}.__call__ runs no pipeline of lora-compose, so there is nothing to plan")
    except _Answer as answer:
        request = answer.made
    finally:
        _asking.reset(token)
    if isinstance(request, Plain):
        raise ValueError("a call without concepts is diffusers' own, which is not planned; name some: concepts=[...]")
    return request


def _composes(prompt: Any, concepts: Any) -> bool:
    texts = prompt if isinstance(prompt, list | tuple) else [prompt]
    return not no_concepts(concepts) or any(has_tags(text) for text in texts if isinstance(text, str))
