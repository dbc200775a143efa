"""Generates the image of a run, the same way for command line, page and evaluation."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lora_compose.attention import backbone_of
from lora_compose.attention.claims import claimed
from lora_compose.attention.device import dtype_of
from lora_compose.compose.figures.overlay import Attention
from lora_compose.compose.files.images import Hashes, Record
from lora_compose.compose.generate.guides import (
    controls_of,
    fit_ip_adapters,
    ip_adapter_arguments,
    pipeline_without_concepts,
    references_of,
)
from lora_compose.compose.generate.machine import machine, versions
from lora_compose.compose.generate.schedulers import scheduler_of
from lora_compose.compose.playground.assets import lora_source
from lora_compose.pipelines.calls.call_plan import CallPlan
from lora_compose.pipelines.calls.finite import causes_of_precision, check_finite
from lora_compose.pipelines.calls.memory import check_size, warn_of_size
from lora_compose.pipelines.concepts.concept_set import LoadedConcept
from lora_compose.pipelines.concepts.finding import find_file
from lora_compose.pipelines.formats.models import models_of
from lora_compose.pipelines.images.output import ComposeOutput, Cost
from lora_compose.pipelines.methods import METHODS, Draft, Settings, make_method
from lora_compose.pipelines.methods.draft import Drafted, draft_only
from lora_compose.pipelines.scene.mask_images import open_image
from lora_compose.pipelines.scene.scene import Concept, Run, Scene
from lora_compose.pipelines.scene.sources import files_of, moved_files
from lora_compose.pipelines.support.home import expanded
from lora_compose.pipelines.support.regular import sha256_of
from lora_compose.pipelines.text.emphasis import plain_text
from lora_compose.pipelines.text.missing import tell_words
from lora_compose.pipelines.text.tokens import check_all_named

logger = logging.getLogger(__name__)

OnStep = Callable[[int, int, Tensor], None]
"""Called after every step with the number of finished steps, the number of all steps, and the latents. Raising ends the
call."""


@dataclass(frozen=True)
class Made:
    """An image and how it was made."""

    image: Image.Image
    record: Record


@dataclass(frozen=True)
class MadeBatch:
    """Images of one call, one for each seed."""

    images: tuple[Made, ...]
    cost: Cost | None
    attention: Attention | None = None


def make(pipe: Any, run: Run, on_progress: Callable[[float], None] | None = None) -> Made:
    """Generates the image of a run. The same run on the same machine is bit-identical.

    The concepts stay loaded in the pipeline, so that the next run with them does not read their files again.

    Args:
        pipe: A pipeline from `open_model`, for this run or one that differs only in scene, method, scheduler, steps,
            guidance or seed.
        on_progress: Called after every step with the finished fraction, up to 1.

    Returns:
        The image, and its record with the method, scheduler and device that were used.

    Raises:
        ValueError: For anything that does not fit together, before any work is done.
    """
    return make_batch(pipe, run, (run.seed,), on_progress).images[0]


def make_batch(
    pipe: Any,
    run: Run,
    seeds: Sequence[int],
    on_progress: Callable[[float], None] | None = None,
    *,
    on_step: OnStep | None = None,
    record_attention: bool = False,
) -> MadeBatch:
    """Makes images of a run that differ in their seed, in one call. The pixels depend on how many there are.

    Args:
        run: What to make; its own seed is not used.
        on_step: Called after every step; may end the call by raising.

    Raises:
        ValueError: For anything that does not fit together, before any work is done.
    """
    seeds = tuple(seeds)
    with _prepared(pipe, run) as (loaded, arguments):
        record = Record(
            run=_as_used(pipe, run),
            versions=versions(),
            sha256=_hashes(loaded),
            images={name: sha256_of(expanded(path)) for name, path in run.scene.image_files.items()},
            machine=machine(pipe._execution_device),  # an offloaded model may be on another device now
        )
        arguments |= {
            "num_images_per_prompt": len(seeds),
            "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
            "callback_on_step_end": _callback(on_progress, on_step) if on_progress or on_step else None,
        }
        if loaded:
            output = pipe(**arguments, record_attention=record_attention)
            record = _with_method(record, output, chosen=run.method is None)
        else:
            told = _callback(on_progress, _finite(pipe, on_step)) if pipe.tells_steps else None
            arguments["callback_on_step_end"] = told
            output = _plain(pipe, run.scene, arguments)
    flags = getattr(output, "nsfw_content_detected", None) or [False] * len(seeds)
    for seed, flagged in zip(seeds, flags, strict=True):
        if flagged:
            logger.warning("the safety checker of the model has replaced the image of seed %d by a black one", seed)
    together = seeds if len(seeds) > 1 else ()
    records = [
        record.model_copy(update={"run": record.run.model_copy(update={"seed": seed}), "batch": together})
        for seed in seeds
    ]
    maps, masks = getattr(output, "attention_maps", None), getattr(output, "masks", None)
    attention = None
    if maps is not None and masks is not None:
        attention = Attention(output.recorded_steps, maps.cpu(), masks.cpu(), output.draft_maps)
    return MadeBatch(tuple(map(Made, output.images, records)), getattr(output, "cost", None), attention)


def draft(pipe: Any, run: Run) -> Drafted:
    """The masks in which each LoRA of a run would act, without its image; the image is divided in the same way.

    Raises:
        ValueError: Whatever `make` would raise; if the method of the run, given or chosen, is not draft.
    """
    with _prepared(pipe, run) as (loaded, arguments):
        settings = pipe.plan(**arguments).choice.method if loaded else None
        if not isinstance(settings, Draft):
            raise ValueError("only the method draft looks at the noise before it makes an image; choose it")
        del arguments["method"]
        return draft_only(pipe, settings, **arguments, generator=[torch.Generator().manual_seed(run.seed)])


def plan(pipe: Any, run: Run) -> CallPlan | None:
    """The plan of `make`, after all its checks, or its ValueError; None without concepts, which diffusers checks.

    The run's concepts stay loaded in the pipeline.
    """
    with _prepared(pipe, run) as (loaded, arguments):
        return pipe.plan(**arguments) if loaded else None


def load(pipe: Any, concept: Concept) -> LoadedConcept:
    """Loads a concept's LoRA into a pipeline unless it is there. ValueError if there is none, or it does not fit."""
    if concept.lora is None:
        return pipe.resolve_concepts([concept])[0]
    concept = concept.model_copy(update={"lora": moved_files(concept.lora, lora_source)})
    # What the file alone decides is loaded; words and region may be others in the next run.
    file = Concept(
        name=concept.name, lora=concept.lora, merge=concept.merge, alpha=concept.alpha, any_weight=concept.any_weight
    )  # fmt: skip
    known = pipe.concepts.get(concept.name)
    same = known is not None and (known.lora, known.merge, known.alpha) == (file.lora, file.merge, file.alpha)
    if known is not None and not same:
        pipe.unload_concept(concept.name)
    if not same:
        pipe.library.check_new(pipe, file.name)
        pipe.library.load(pipe, file, [find_file(source) for source in files_of(file.lora)])
    loaded = pipe.resolve_concepts([concept])[0]
    if not same:
        tell_words(loaded, concept)
    return loaded


def steps_of(pipe: Any, run: Run) -> int:
    """How many of a run's steps are run: a part from a start image. ValueError if the model starts from none."""
    if run.scene.image is None:
        return run.steps
    return pipe.steps_from_image(run.steps, run.scene.strength, run.scene.mask_image is not None)


def size_of(pipe: Any, scene: Scene) -> tuple[int, int]:
    """Width and height of a scene's images in pixels. ValueError if an image is unreadable, or the model reads none.

    By default the size of the start image, unless a part of it is enlarged, or what the model makes of the reference
    images, otherwise the model's own.
    """
    references = references_of(pipe, scene)
    if scene.image is not None and scene.padding_mask_crop is None:
        width, height = pipe.size_from_start(*open_image(scene.image, "image").size)
        return scene.width or width, scene.height or height
    # Both are always passed: if one is missing, diffusers takes the model's own size for both.
    width, height = pipe.size_from(references) if references else pipe.own_size
    return scene.width or width, scene.height or height


def method_of(run: Run) -> Settings | None:
    """The method that a run asks for, or None. Raises ValueError for what is unknown, and settings without a method."""
    if run.settings and run.method is None:
        raise ValueError(f"the settings {', '.join(run.settings)} need a method; there are {', '.join(METHODS)}")
    method = None if run.method is None else make_method(run.method, run.settings)
    if method is not None and not run.scene.concepts:
        raise ValueError(f"the method {run.method} needs concepts, and the scene has none")
    return method


@contextmanager
def _prepared(pipe: Any, run: Run) -> Iterator[tuple[list[LoadedConcept], dict[str, Any]]]:
    """Concepts and the arguments of the call, with the run's scheduler in the pipeline inside this block."""
    if (dtype := dtype_of(pipe.model)) != getattr(torch, run.dtype):
        raise ValueError(f"the run asks for {run.dtype}, but the model was opened in {dtype}; open it again")
    size = size_of(pipe, run.scene)
    pipe.check_sides(*size)
    check_size(backbone_of(pipe.model), pipe.vae_scale_factor, pipe.runs_on, *size)
    if not run.scene.concepts:  # otherwise its plan warns
        warn_of_size(pipe, *size)
    loaded = [load(pipe, concept) for concept in run.scene.concepts]
    check_all_named((concept.concept for concept in loaded), plain_text(run.scene.prompt))
    method = method_of(run)
    before, scheduler = pipe.scheduler, scheduler_of(pipe, run)
    fit_ip_adapters(pipe, run.scene.ip_adapters)
    arguments = {
        "prompt": run.scene.prompt,
        **pipe.sized(*size),
        "num_inference_steps": run.steps,
        **pipe.guided(run.guidance_scale, run.scene.negative_prompt or None),
        "concepts": [concept.concept for concept in loaded],
        "method": method,
        **run.scene.start,
        **ip_adapter_arguments(run.scene.ip_adapters, size),
    }
    if run.scene.references:
        arguments["image"] = references_of(pipe, run.scene)
    if run.scene.controls:
        arguments["control"] = controls_of(pipe, run.scene.controls, size)
    pipe.scheduler = scheduler
    try:
        yield loaded, arguments
    finally:
        pipe.scheduler = before


def _plain(pipe: Any, scene: Scene, arguments: dict[str, Any]) -> Any:
    """A call without concepts, as diffusers does it."""
    controls = arguments.pop("control", None)
    if controls is None:
        return pipe(**arguments)
    plain, more = pipeline_without_concepts(pipe, scene, controls)
    with claimed(models_of(pipe), "read"):
        return plain(**{name: it for name, it in arguments.items() if name not in ("concepts", "method")}, **more)


def _as_used(pipe: Any, run: Run) -> Run:
    return run.model_copy(update={"scheduler": type(pipe.scheduler).__name__, "device": str(pipe._execution_device)})


def _with_method(record: Record, output: ComposeOutput, *, chosen: bool) -> Record:
    """The record of a call with the method that ran, and with the reason if the call has chosen it."""
    run = record.run.model_copy(update={"method": output.method, "settings": output.settings})
    return record.model_copy(update={"run": run, "method_reason": output.method_reason if chosen else None})


def _hashes(loaded: Sequence[LoadedConcept]) -> dict[str, Hashes]:
    every = {lora.concept.name: tuple(file.sha256 for file in lora.files) for lora in loaded if lora.files}
    return {name: hashes[0] if len(hashes) == 1 else hashes for name, hashes in every.items()}


def _finite(pipe: Any, on_step: OnStep | None) -> OnStep:
    """Looks at the final latents of a call without concepts, where diffusers would make a black image of NaN."""

    def after_step(done: int, steps: int, latents: Tensor) -> None:
        if on_step is not None:
            on_step(done, steps, latents)
        if done == steps:
            damaged = "weights of the model that are damaged, or do not fit its precision"
            check_finite(latents, [*causes_of_precision(dtype_of(pipe.model)), damaged])

    return after_step


def _callback(on_progress: Callable[[float], None] | None, on_step: OnStep | None) -> Callable[..., dict]:
    def after_step(pipe: Any, step: int, timestep: Any, tensors: dict) -> dict:
        if on_progress is not None:
            on_progress((step + 1) / pipe.num_timesteps)
        if on_step is not None:
            on_step(step + 1, pipe.num_timesteps, tensors["latents"])
        return {}

    return after_step
