"""Image-to-image and inpainting, the same for all model families; diffusers' pipelines prepare the image."""

import inspect
import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor, nn

from lora_compose.pipelines.calls.call import (
    Call,
    Composition,
    check_arguments,
    check_plain,
    composed,
    listed,
    no_concepts,
    refuse_unknown,
    tensors_for,
)
from lora_compose.pipelines.calls.finite import check_decoded
from lora_compose.pipelines.calls.front import OF_OURS, OF_START_IMAGE, Begun, Plain, Request
from lora_compose.pipelines.calls.outcome import output_of
from lora_compose.pipelines.calls.refine import Origin
from lora_compose.pipelines.calls.resolved_call import ResolvedCall
from lora_compose.pipelines.control.spec import controls_of
from lora_compose.pipelines.families.base import ComposePipeline
from lora_compose.pipelines.images.from_image import FromImage, Source, TaskPipeline, check_steps, steps_left


@dataclass(frozen=True)
class ImageTask:
    """diffusers' pipeline for a task that starts from an image, and whether it resizes that to width and height."""

    pipeline: type[TaskPipeline]
    resizes: bool


class ImageTasksPipeline(ComposePipeline):
    """A composing pipeline whose calls may start from an image."""

    image_to_image: ClassVar[ImageTask | None] = None
    """diffusers' image-to-image for the family; None if there is none."""

    inpainting: ClassVar[ImageTask | None] = None
    """diffusers' inpainting for the family; None if there is none."""

    starts_from_latents: ClassVar[bool] = True
    """Whether latents may be given in place of an image."""

    rounds_steps_up: ClassVar[bool] = False
    """Whether diffusers' pipelines round the number of steps that a strength leaves up."""

    old_arguments: ClassVar[Collection[str]] = ()
    """Arguments that diffusers takes beside those that it names."""

    attention_settings: ClassVar[Collection[str]] = ("scale",)
    """Arguments for attention processors that go with concepts."""

    reads_image_prompts: ClassVar[bool] = False
    """Whether IP-Adapters go with concepts."""

    reads: ClassVar[Collection[str]] = ()
    """Arguments of diffusers' `__call__` that calls with concepts read, beside those of every family (`READ`).

    Those that are refused with a reason of their own are among them, but for IP-Adapters.
    """

    of_inpainting: ClassVar[Collection[str]] = ("mask",)
    """Tensors that callbacks may name where a call with concepts inpaints, beside those of every call."""

    check_inputs: Any
    """diffusers' checks of the arguments of a call."""

    def guided(self, scale: float, negative_prompt: str | None) -> dict[str, Any]:
        """Arguments of a call with classifier-free guidance.

        Args:
            scale: As the family means `guidance_scale`.
            negative_prompt: What to avoid; None means nothing, for which SDXL gets zeros instead of an empty text.

        Raises:
            ValueError: If the family takes no negative prompt.
        """
        return {"guidance_scale": scale, "negative_prompt": negative_prompt}

    @property
    def unconditional_prompt(self) -> str | None:
        """The text of unconditional rows where there is nothing to avoid; None where guidance has no such rows."""
        guided = self.guided(1.0, None)
        return (guided["negative_prompt"] or "") if "negative_prompt" in guided else None

    @property
    def _text_dtype(self) -> torch.dtype:
        """The precision of diffusers' text, in which it prepares the image."""
        parts = (self.components.get(name) for name in ("text_encoder_2", "text_encoder"))
        # A compiled model cannot be asked whether it is true.
        return next((part for part in parts if part is not None), self.model).dtype

    def runs_as_diffusers(self, inpaints: bool) -> bool:
        """Whether diffusers' pipeline makes images without concepts; otherwise our own loop does."""
        return True

    def begin(self, given: Mapping[str, Any]) -> Begun | Plain:
        """A call with these arguments by name: begun with concepts, or diffusers' own."""
        started, unknown = time.perf_counter(), given["kwargs"]
        given = self._read(dict(given))
        allowed = self.old_arguments if no_concepts(given["concepts"]) else ()
        refuse_unknown([name for name in unknown if name not in allowed], type(self).__call__)
        prompt, concepts = self.named_concepts(given["prompt"], given["concepts"])
        composition = Composition(
            concepts or (), given["method"], controls_of(given["control"]), given["token_positions"],
            given["record_attention"],
        )  # fmt: skip
        channels = self.vae.config.get("latent_channels") if self.starts_from_latents else None
        start = FromImage.of(
            given["image"], given["mask_image"], given["strength"], given["padding_mask_crop"],
            given["paste_original"], channels, self.vae_scale_factor,
        )  # fmt: skip
        if start is not None:
            self.task_for(start.inpaints)  # refuses tasks that the family does not have
        given["prompt"] = prompt
        if no_concepts(concepts):
            check_plain(composition)
            arguments = {name: it for name, it in given.items() if name not in {"kwargs", *OF_OURS, *OF_START_IMAGE}}
            if (tensors := arguments["callback_on_step_end_tensor_inputs"]) is not None:
                arguments["callback_on_step_end_tensor_inputs"] = list(tensors)
            if self.runs_as_diffusers(start is not None and start.inpaints):
                return Plain(partial(self._as_diffusers, arguments, start, unknown))
        check_arguments(given, self.attention_settings, image_prompts=self.reads_image_prompts)
        given |= {name: composed(given[name]) for name in ("prompt", "prompt_2") if name in given}
        return Begun(given, composition, start, started)

    def _read(self, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call as the family reads them."""
        return given

    def _as_diffusers(self, arguments: dict[str, Any], start: FromImage | None, unknown: Mapping[str, Any]) -> Any:
        """A call without concepts: exactly what diffusers' pipeline for the task does."""
        arguments = {**self._plain_arguments(arguments, start), **unknown}
        if start is not None:
            return self._from_image_as_diffusers(start, arguments)
        return self._plain_class().__call__(self, **arguments)

    def _plain_arguments(self, arguments: dict[str, Any], start: FromImage | None) -> dict[str, Any]:
        """A call's arguments without concepts as diffusers takes them; refuses what it would not see to be wrong."""
        return arguments

    def steps_from_image(self, steps: int, strength: float | None, inpaints: bool) -> int:
        """How many of the steps are run in a call that starts from an image.

        Args:
            strength: The share of them; None is diffusers' default for the task.

        Raises:
            ValueError: If the family does not have the task.
        """
        return steps_left(steps, self.strength_for(strength, inpaints), rounds_up=self.rounds_steps_up)

    def size_from_start(self, width: int, height: int) -> tuple[int, int]:
        """Width and height at which an image of this size is worked on by default, in pixels: in whole cells."""
        return width // self.cell * self.cell, height // self.cell * self.cell

    @classmethod
    def task_for(cls, inpaints: bool) -> ImageTask:
        """The task of a call that starts from an image; raises ValueError if the family does not have it."""
        own_task = cls.inpainting if inpaints else cls.image_to_image
        if own_task is not None:
            return own_task
        task, other = ("inpainting", "image-to-image") if inpaints else ("image-to-image", "inpainting")
        also = cls.image_to_image if inpaints else cls.inpainting
        advice = f"it has {other}" if also is not None else "images are made from text only"
        what = ": give mask_image=..., or leave out image" if also is not None and not inpaints else ""
        raise ValueError(f"diffusers has no {task} for {cls.family}; {advice}{what}")

    @classmethod
    def strength_for(cls, given: float | None, inpaints: bool) -> float:
        """The strength of a call; None is diffusers' default for the task."""
        call = cls.task_for(inpaints).pipeline.__call__
        return inspect.signature(call).parameters["strength"].default if given is None else given

    @property
    def cell(self) -> int:
        """Sides of images are multiples of so many pixels."""
        raise NotImplementedError

    def check_sides(self, width: int, height: int) -> None:
        """Raises ValueError for sides in pixels that are no multiples of `cell`; the message names the nearest."""
        self.check_multiples(self.cell, width, height)

    @classmethod
    def check_multiples(cls, cell: int, width: int, height: int) -> None:
        """As `check_sides`, of a model of the family that need not be open."""
        cells = [(side // cell, math.ceil(side / cell)) for side in (width, height)]
        smaller, larger = ([max(1, count) * cell for count in counts] for counts in zip(*cells, strict=True))
        if smaller != [width, height]:
            raise ValueError(
                f"width and height must be multiples of {cell} with {cls.family}, not {width} x {height}; the "
                f"nearest are {smaller[0]} x {smaller[1]} and {larger[0]} x {larger[1]}"
            )

    def _size(self, width: int | None, height: int | None) -> tuple[int, int]:
        """Width and height of a call in pixels; None means the model's own."""
        raise NotImplementedError

    @property
    def mask_processor(self) -> VaeImageProcessor:
        """How masks are prepared: that of diffusers' inpainting."""
        if self.inpainting is None:
            raise AttributeError(f"diffusers has no inpainting for {self.family}, and so no mask_processor")
        return self._task_pipeline(inpaints=True).mask_processor

    def _task_pipeline(self, *, inpaints: bool) -> Any:
        """The pipeline of diffusers for a task, with the same components and properties of the call."""
        kind = self.task_for(inpaints).pipeline
        names = inspect.signature(kind.__init__).parameters
        parts = {name: part for name, part in self.components.items() if name in names}
        options = {name: self.config[name] for name in names if name in self.config and name not in self.components}
        if "add_watermarker" in names:
            options["add_watermarker"] = False
        pipe = _with_properties_of(self, kind)(**parts, **options)
        kept = ("watermark", "_progress_bar_config")
        pipe.__dict__.update({name: self.__dict__[name] for name in kept if name in self.__dict__})
        prepares: Any = self.image_processor.config  # which a program may have replaced by another
        pipe.image_processor.register_to_config(**{name: prepares[name] for name in _PREPARES if name in prepares})
        return pipe

    def _check_start(self, given: FromImage | None) -> None:
        """Raises ValueError for images that the model cannot start from, with and without concepts."""

    def _check_composed(self, given: FromImage) -> None:
        """Raises ValueError for images that the model cannot start from with concepts."""

    def _image_size(self, given: FromImage, arguments: Mapping[str, Any]) -> tuple[int, int]:
        """Width and height in pixels of what is worked on; refuses images that are too small or of another size."""
        width, height = arguments["width"], arguments["height"]
        given.check_size(self.cell)
        if self.task_for(given.inpaints).resizes:
            size = self._size(width, height)
        else:
            own = self._kept_size(given, arguments)
            size = width or own[0], height or own[1]
            if given.padding_mask_crop is None and size != own:
                raise ValueError(
                    f"width and height are those of the image, {own[0]} x {own[1]} as this model reads it; resize the "
                    "image, or leave them out"
                )
        self.check_sides(*size)
        return size

    def _kept_size(self, given: FromImage, arguments: Mapping[str, Any]) -> tuple[int, int]:
        """Width and height, in pixels, of the part that is worked on, in tasks that keep the size of the image."""
        return given.rounded_size(self.vae_scale_factor if given.is_latents else self.cell)

    def _check_plain_start(self, given: FromImage, arguments: Mapping[str, Any]) -> None:
        """Raises ValueError for a start image that cannot be used in a call without concepts."""
        self._check_start(given)
        self._image_size(given, arguments)
        check_steps(
            _steps(arguments), self.strength_for(given.strength, given.inpaints), rounds_up=self.rounds_steps_up
        )
        prompt, embeds = arguments["prompt"], arguments.get("prompt_embeds")
        given.check_masks(len(listed(prompt) if embeds is None else embeds))

    def _from_image_as_diffusers(self, given: FromImage, arguments: Mapping[str, Any]) -> Any:
        """A call without concepts that starts from an image: exactly what diffusers' pipeline for the task does."""
        self._check_plain_start(given, arguments)
        pipe = self._task_pipeline(inpaints=given.inpaints)
        if not self.task_for(given.inpaints).resizes:
            arguments = {**arguments, "width": None, "height": None}
        taken = inspect.signature(type(pipe).__call__).parameters
        own = inspect.signature(type(self).__call__).parameters
        left_out = [name for name in arguments if name not in taken and name in own]
        unread = [name for name in left_out if arguments[name] != own[name].default]
        if unread := unread + [name for name in given.arguments if name not in taken]:
            name = "inpainting" if given.inpaints else "image-to-image"
            raise ValueError(f"{', '.join(unread)} cannot be given for {name}")
        if given.paste_original and arguments["output_type"] != "pil":
            raise ValueError(_PIL_ONLY)
        callback = arguments["callback_on_step_end"]
        if callback is not None:  # it is given the pipeline that was called
            names = tensors_for(callback, arguments["callback_on_step_end_tensor_inputs"])
            called = {"callback_on_step_end": lambda _, *step: callback(self, *step)}
            arguments = {**arguments, **called, "callback_on_step_end_tensor_inputs": names}
        with precision_kept(self.vae):
            output = pipe(**given.arguments, **{name: value for name, value in arguments.items() if name in taken})
        self.maybe_free_model_hooks()
        if not given.paste_original or given.padding_mask_crop is not None:  # which diffusers has pasted
            return output
        images = output.images if arguments["return_dict"] else output[0]
        images[:] = given.pasted(images, pipe.image_processor)
        return output

    def _source(self, begun: Begun) -> tuple[Source | None, tuple[int, int]]:
        """The start image of a call, made ready, and the size in pixels. ValueError for other models and outputs."""
        given, start = begun.given, begun.start
        self._check_start(start)
        if start is None:
            return None, self._size(given["width"], given["height"])
        self._check_composed(start)
        if (start.paste_original or start.padding_mask_crop is not None) and given["output_type"] != "pil":
            raise ValueError(_PIL_ONLY)
        source = Source.of(
            start, self._task_pipeline(inpaints=start.inpaints), self.strength_for(start.strength, start.inpaints),
            self._image_size(start, given), rounds_up=self.rounds_steps_up,
        )  # fmt: skip
        return source, source.size

    def _check_inputs(self, begun: Begun, size: tuple[int, int]) -> None:
        """The checks of diffusers' pipeline, with the size of the images in pixels."""
        known = {**begun.given, "width": size[0], "height": size[1], "callback_steps": None}
        known["callback_on_step_end_tensor_inputs"] = self._of_every_task(begun.tensors, begun.start)
        names = [name for name in inspect.signature(self._plain_class().check_inputs).parameters if name in known]
        self.check_inputs(**{name: known[name] for name in names if "ip_adapter" not in name})

    def run_request(self, request: Request) -> Any:
        """Runs a call with concepts, decodes its latents, and returns what the family's `__call__` promises."""
        latents, process, outcome = self.compose(request.call, request.encode)
        if "_current_timestep" in request.call.properties:
            self.__dict__["_current_timestep"] = None
        results = request.decode(latents, process)
        maybe_free_model_hooks: Any = self.maybe_free_model_hooks
        maybe_free_model_hooks()
        return output_of(outcome, *results) if request.named else tuple(results)

    def sized(self, width: int, height: int) -> dict[str, Any]:
        """Arguments of a call whose images have this size in pixels."""
        return {"width": width, "height": height}

    def _postprocess(self, image: Tensor, output_type: str, **options: Any) -> Any:
        check_decoded(image)
        return self.image_processor.postprocess(image, output_type=output_type, **options)

    def _by_image(self, call: Call, given: Tensor) -> Tensor:
        """The start image or mask of all images of the batch, or that of every one."""
        count = 1 if len(given) == 1 else call.size.images_per_prompt
        return given if count == 1 else given.repeat_interleave(count, dim=0)  # whose layout in memory is another

    def _of_every_task(self, tensors: Sequence[str], given: FromImage | None) -> list[str]:
        """Tensors for callbacks without those that only inpainting has."""
        return [name for name in tensors if name not in self.of_inpainting or given is None or not given.inpaints]

    def _finished(self, images: Any, source: Source | None) -> Any:
        """Images with what is outside of the mask pasted in, where that is asked for."""
        if source is None or source.mask is None:
            return images
        if source.crop is None and not source.given.paste_original:
            return images
        return source.given.pasted(images, source.pipeline.image_processor, source.crop)

    def _origin(self, call: Call, resolved: ResolvedCall) -> Origin | None:
        prompts, sampling = call.prompts.first, call.sampling
        if prompts is None or call.source is not None or sampling.has_schedule or self.inpainting is None:
            return None
        if call.references:
            return None
        if call.image_prompts is not None and not call.image_prompts.for_any_part:
            return None
        sets = {index: of_set.concepts for of_set in resolved.sets for index in of_set.indices}
        each = [sets[index] for index in range(len(prompts))]
        options = {"num_inference_steps": sampling.num_inference_steps, **call.repaint}
        columns = [range(len(concepts.loaded)) if concepts.columns is None else concepts.columns for concepts in each]
        return Origin(
            self, prompts, [concepts.concepts for concepts in each], columns, call.size.images_per_prompt, options
        )


_OF_A_CALL = (
    "_attention_kwargs", "_cfg_normalization", "_cfg_truncation", "_clip_skip", "_cross_attention_kwargs",
    "_current_timestep", "_denoising_end", "_denoising_start", "_guidance_rescale", "_guidance_scale", "_interrupt",
    "_joint_attention_kwargs", "_num_timesteps",
)  # fmt: skip
"""Attributes that diffusers' pipelines set in a call, and that callbacks and other threads change."""


def _with_properties_of(host: ImageTasksPipeline, kind: type[TaskPipeline]) -> Any:
    """A class of diffusers whose calls set, and read, the attributes of another pipeline."""

    def shared(name: str) -> property:
        return property(lambda _: getattr(host, name), lambda _, value: setattr(host, name, value))

    return type(kind.__name__, (kind,), {name: shared(name) for name in _OF_A_CALL})


_PREPARES = ("do_resize", "resample", "do_normalize", "do_convert_rgb")  # settings of an image processor
_PIL_ONLY = "padding_mask_crop and paste_original give PIL images; leave output_type='pil'"


def _steps(arguments: Mapping[str, Any]) -> int:
    """How many steps a call asks for."""
    schedule = arguments["sigmas"] if arguments.get("timesteps") is None else arguments["timesteps"]
    return arguments["num_inference_steps"] if schedule is None else len(schedule)


@contextmanager
def precision_kept(model: nn.Module) -> Iterator[None]:
    """A model has the precision afterwards that it had before: diffusers changes a VAE's to encode with it."""
    before: Any = model.dtype
    try:
        yield
    finally:
        if model.dtype != before:
            model.to(dtype=before)
