"""The front of a call, the same for all families: diffusers' arguments become a `Request`, to be planned or run."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Any, Protocol

import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from lora_compose.attention import Claim
from lora_compose.pipelines.calls.call import (
    Call,
    Callback,
    Composition,
    Concepts,
    GivenPrompts,
    ImageSize,
    Sampling,
    images_of_each,
    listed,
    no_concepts,
    tensors_for,
)
from lora_compose.pipelines.concepts.tags import has_tags
from lora_compose.pipelines.control.spec import Control
from lora_compose.pipelines.denoising.guidance import Guider
from lora_compose.pipelines.denoising.process import Process
from lora_compose.pipelines.formats.models import models_of
from lora_compose.pipelines.images.from_image import FromImage
from lora_compose.pipelines.methods import Settings
from lora_compose.pipelines.text.conditioning import TokenPositions
from lora_compose.pipelines.text.encoder import FamilyEncoder
from lora_compose.pipelines.text.tokens import Tokenizer


class Composes(Protocol):
    """A family's pipeline, as the front of its calls needs it."""

    def runs_as_diffusers(self, inpaints: bool) -> bool:
        """Whether diffusers' pipeline makes images without concepts; otherwise our own loop does."""
        ...

    @property
    def reads(self) -> Collection[str]:
        """Arguments of diffusers that calls with concepts read, beside those of every family."""
        ...

    def begin(self, given: Mapping[str, Any]) -> "Begun | Plain":
        """A call with concepts, begun, or one that is diffusers' own; takes the arguments by name."""
        ...

    def run_request(self, request: "Request") -> Any:
        """Runs a call with concepts."""
        ...


OF_OURS = {
    "concepts": (Concepts | None, None), "method": (str | Settings | None, None),
    "control": (Control | Sequence[Control] | None, None), "token_positions": (TokenPositions | None, None),
    "record_attention": (bool | Sequence[int], False),
}  # fmt: skip
"""Arguments for concepts, with their types and defaults."""

OF_START_IMAGE = {
    "image": (Any, None), "mask_image": (Any, None), "strength": (float | None, None),
    "padding_mask_crop": (int | None, None), "paste_original": (bool, False),
}  # fmt: skip
"""Arguments for calls that start from an image, with their types and defaults."""

READ = {
    "self", "prompt", "height", "width", "num_inference_steps", "guidance_scale", "num_images_per_prompt", "generator",
    "latents", "output_type", "return_dict", "callback_on_step_end", "callback_on_step_end_tensor_inputs",
}  # fmt: skip
"""Arguments of diffusers that calls with concepts read in every family."""


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
    """The arguments of a call with concepts, checked and completed as in every family.

    Attributes:
        given: The arguments of `__call__` by name. The prompt is without tags; with `concepts="auto"`, it has the
            triggers of the concepts that it names.
        started: When the call began, by `time.perf_counter()`.
    """

    given: Mapping[str, Any]
    composition: Composition
    start: FromImage | None
    started: float

    def call(self, prompts: GivenPrompts, size: tuple[int, int], guider: Guider, **fields: Any) -> Call:
        """The call that is made of it.

        Args:
            size: Width and height in pixels.
            fields: Further fields of the call.
        """
        given = self.given
        sampling = Sampling(
            given["num_inference_steps"], given.get("timesteps"), given.get("sigmas"), given.get("denoising_end"),
            given["generator"], given["latents"], given.get("eta", 0.0), guider,
        )  # fmt: skip
        size_of_images = ImageSize(*size, self.images_per_prompt)
        callback = Callback(given["callback_on_step_end"], self.tensors)
        return Call(self.composition, prompts, size_of_images, sampling, callback, self.started, **fields)

    def prompts(
        self, length: int | None, embeds: Tensor | None = None, tokenizers: Sequence[Tokenizer] | None = None
    ) -> GivenPrompts:
        """The prompts of a family with one text for each image (`GivenPrompts`).

        Args:
            embeds: The given embeddings, if the model has them in another form.
        """
        prompt, embeds = self.given["prompt"], self.given.get("prompt_embeds") if embeds is None else embeds
        negative = [listed(self.given.get("negative_prompt"))]
        return GivenPrompts(None if prompt is None else [listed(prompt)], embeds, length, negative, tokenizers)

    @property
    def images_per_prompt(self) -> int:
        """Images of each prompt."""
        return images_of_each(self.given["num_images_per_prompt"])

    @property
    def tensors(self) -> Sequence[str]:
        """Names of the tensors that the callback is given."""
        return tensors_for(self.given["callback_on_step_end"], self.given["callback_on_step_end_tensor_inputs"])


class _Answer(BaseException):
    """Ends a call of a class that overrides `__call__`, and carries its request past what overrides it."""

    def __init__(self, made: Request | Plain) -> None:
        super().__init__()
        self.made = made


_asking: ContextVar[bool] = ContextVar("a call is planned, not run", default=False)

_requests: dict[Any, Callable[..., Request | Plain]] = {}
"""By `__call__` of a family, what makes the request of the same arguments."""


def front(
    like: Callable[..., Any] | Signature, **further: tuple[Any, Any]
) -> Callable[[Callable[[Any, Begun], Request]], Callable[..., Any]]:
    """Turns the function that makes a family's requests into its `__call__`.

    A call claims the denoiser and the text encoders from its first line to its last: to change them, if it has
    concepts. It raises RuntimeError if another call changes one of these models, or reads one that it would change.

    Args:
        like: `__call__` of diffusers' pipeline, or arguments that the family reads (`arguments_with`); ours are added,
            by name only.
        further: Further arguments of the family, with their types and defaults.

    Raises:
        ValueError: In a call with concepts, for an argument of diffusers that the family does not read.
    """
    known = like if isinstance(like, Signature) else signature(like)
    theirs = [it for it in known.parameters.values() if it.kind is not it.VAR_KEYWORD]
    of_family = [] if known is like else [it for it in theirs if it.name not in READ]
    ours = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in (OF_OURS | OF_START_IMAGE | further).items() if name not in known.parameters
    ]  # fmt: skip
    arguments = Signature(
        [*theirs, *ours, Parameter("kwargs", Parameter.VAR_KEYWORD)], return_annotation=BaseOutput | tuple
    )

    def decorate(make: Callable[[Any, Begun], Request]) -> Callable[..., Any]:
        def made(pipe: Composes, given: Mapping[str, Any]) -> Request | Plain:
            begun = pipe.begin(given)
            if isinstance(begun, Plain):
                return begun
            unread = [it.name for it in of_family if it.name not in pipe.reads]
            if new := [name for name in unread if not _same(given[name], known.parameters[name].default)]:
                raise ValueError(f"{', '.join(new)} cannot be combined with concepts; leave it out")
            return make(pipe, begun)

        def named(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Composes, dict[str, Any]]:
            bound = arguments.bind(*args, **kwargs)
            bound.apply_defaults()
            given = dict(bound.arguments)
            return given.pop("self"), given

        @wraps(make)
        def call(*args: Any, **kwargs: Any) -> BaseOutput | tuple:
            pipe, given = named(args, kwargs)
            if _asking.get():
                raise _Answer(made(pipe, given))
            ours = not pipe.runs_as_diffusers(given["mask_image"] is not None)
            composes = ours or _composes(given["prompt"], given["concepts"])
            claim = Claim(models_of(pipe), "compose" if composes else "read")
            try:
                try:
                    claim.take()
                    with torch.no_grad():
                        request = made(pipe, given)
                        return request.run() if isinstance(request, Plain) else pipe.run_request(request)
                finally:
                    claim.end()
            finally:
                claim.end()

        _requests[call] = lambda *args, **kwargs: made(*named(args, kwargs))
        call.__dict__["__signature__"] = arguments
        typed = {it.name: it.annotation for it in arguments.parameters.values() if it.annotation is not it.empty}
        call.__annotations__ = {**typed, "return": arguments.return_annotation}
        return call

    return decorate


def arguments_with(**defaults: Any) -> Signature:
    """The arguments of a `__call__` with these defaults, in this order."""
    own = {"self": Parameter.empty, **defaults}
    return Signature([Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=it) for name, it in own.items()])


def request_of(pipe: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Request:
    """The request that a call of a pipeline with these arguments would run.

    Nothing is called, but in a class that overrides `__call__`: there the code before its call of ours runs. Raises
    ValueError for arguments that do not fit together, and calls without concepts.
    """
    of_family = _requests.get(type(pipe).__call__)
    request = _asked(pipe, args, kwargs) if of_family is None else of_family(pipe, *args, **kwargs)
    if isinstance(request, Plain):
        raise ValueError("a call without concepts is diffusers' own, which is not planned; name some: concepts=[...]")
    return request


def _asked(pipe: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Request | Plain:
    """The request of a class that overrides `__call__`, which is called up to its call of ours."""
    token = _asking.set(True)
    try:
        pipe(*args, **kwargs)
    except _Answer as answer:
        return answer.made
    finally:
        _asking.reset(token)
    raise TypeError(f"{type(pipe).__name__}.__call__ runs no pipeline of lora-compose, so there is nothing to plan")


def _same(given: Any, default: Any) -> bool:
    """Whether an argument has its default; tensors, which are compared by element, are never read."""
    if given is default:
        return True
    if type(given) is not type(default):
        return False
    if isinstance(given, list | tuple):
        return len(given) == len(default) and all(map(_same, given, default))
    return isinstance(given, str | int | float) and given == default


def _composes(prompt: Any, concepts: Any) -> bool:
    texts = prompt if isinstance(prompt, list | tuple) else [prompt]
    return not no_concepts(concepts) or any(has_tags(text) for text in texts if isinstance(text, str))
