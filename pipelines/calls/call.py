"""The arguments of a call with concepts, the same for all model families, and their checks."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any
from unicodedata import normalize

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from lora_compose.pipelines.concepts.concept_set import LoadedConcept
from lora_compose.pipelines.control.image_prompts import PreparedImagePrompts
from lora_compose.pipelines.control.spec import Control
from lora_compose.pipelines.denoising.guidance import Embedded, Guider
from lora_compose.pipelines.images.from_image import Source, check_steps
from lora_compose.pipelines.images.task import OF_INPAINTING
from lora_compose.pipelines.methods import Settings
from lora_compose.pipelines.scene.given import is_set
from lora_compose.pipelines.scene.regions import check_region
from lora_compose.pipelines.scene.scene import ConceptNames
from lora_compose.pipelines.support.spelling import did_you_mean
from lora_compose.pipelines.text.conditioning import TokenPositions
from lora_compose.pipelines.text.tokens import Tokenizer

Generators = torch.Generator | list[torch.Generator] | None

Concepts = ConceptNames | Sequence[ConceptNames]
"""A concept set for all prompts, or one for each prompt."""

ATTENTION_ARGUMENTS = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")
"""What diffusers' pipelines call the arguments for attention processors."""


@dataclass(frozen=True)
class Composition:
    """The concepts of a call, and how they are fused.

    Attributes:
        concepts: A concept set for all prompts, or one for each.
        method: The method; None chooses one.
        token_positions: With embeddings: where each concept's trigger is.
        record_attention: Steps whose attention maps are recorded.
    """

    concepts: Concepts
    method: str | Settings | None = None
    controls: Sequence[Control] = ()
    token_positions: TokenPositions | None = None
    record_attention: bool | Sequence[int] = False


@dataclass(frozen=True)
class GivenPrompts:
    """The prompts of a call.

    Attributes:
        texts: The prompts for each tokenizer; None with embeddings.
        embeds: Embeddings, instead of prompts. Shape: [prompts, tokens, channels].
        length: Tokens of an encoded text; None means as many as the tokenizer says.
        negative: The negative prompts for each tokenizer: one for each prompt, one for all, or none.
        tokenizers: Tokenizers of this call, where they depend on more than the length, such as reference images in the
            text; None means the host's.
        negative_embeds: Embeddings, instead of negative prompts, for models that read texts in chunks. Shape: as
            `embeds`.
    """

    texts: Sequence[Sequence[str]] | None
    embeds: Tensor | None = None
    length: int | None = None
    negative: Sequence[Sequence[str]] = ()
    tokenizers: Sequence[Tokenizer] | None = None
    negative_embeds: Tensor | None = None

    @property
    def first(self) -> Sequence[str] | None:
        """The prompts for the first tokenizer; None with embeddings."""
        return None if self.texts is None else self.texts[0]

    def __len__(self) -> int:
        """Number of prompts."""
        prompts = self.first if self.embeds is None else self.embeds
        return 0 if prompts is None else len(prompts)


@dataclass(frozen=True)
class ImageSize:
    """Width and height in pixels, and how many images each prompt gets."""

    width: int
    height: int
    images_per_prompt: int = 1


@dataclass(frozen=True)
class Sampling:
    """How latents are denoised; fields as in diffusers.

    Attributes:
        num_inference_steps: Denoising steps; unused where `timesteps` or `sigmas` are given.
        sigmas: Noise levels of the steps.
        denoising_end: Fraction of the denoising after which the call ends.
        eta: The eta of schedulers like DDIM.
    """

    num_inference_steps: int | None
    timesteps: list[int] | None = None
    sigmas: list[float] | None = None
    denoising_end: float | None = None
    generator: Generators = None
    latents: Tensor | None = None
    eta: float = 0.0
    guider: Guider = field(default_factory=Embedded)

    @property
    def has_schedule(self) -> bool:
        """Whether timesteps or noise levels, and with them their number, are given."""
        return self.timesteps is not None or self.sigmas is not None


@dataclass(frozen=True)
class Callback:
    """The user's function after every step, and the names of the tensors that it is given."""

    function: Callable | None = None
    tensors: Sequence[str] = ()


@dataclass(frozen=True)
class Call:
    """The arguments of a call with concepts.

    Attributes:
        started: When the call began, by `time.perf_counter()`.
        inputs: Further arguments of every forward pass; tensors are marked (`ByImage`, `OnGrid`).
        properties: Attributes that diffusers' pipeline has during a call.
        source: The image to start from; None means text-to-image.
        references: Reference images, prepared for the VAE, of any sizes. Shape: [1, 3, height, width] each.
        repaint: Further arguments of calls that repaint the subjects of the images (`Origin.options`).
    """

    composition: Composition
    prompts: GivenPrompts
    size: ImageSize
    sampling: Sampling
    callback: Callback
    started: float
    inputs: Mapping[str, Any] = field(default_factory=dict)
    properties: Mapping[str, Any] = field(default_factory=dict)
    source: Source | None = None
    repaint: Mapping[str, Any] = field(default_factory=dict)
    image_prompts: PreparedImagePrompts | None = None
    references: Sequence[Tensor] = ()


def no_concepts(concepts: Concepts | None) -> bool:
    """Whether there is no concept for any prompt."""
    return not concepts or all(is_set(entry) and not entry for entry in concepts)


def check_plain(composition: Composition) -> None:
    """Checks a call without concepts; raises ValueError if an argument is given that needs concepts."""
    if composition.controls:
        raise ValueError(
            "control needs concepts; without them, diffusers has StableDiffusionControlNetPipeline, "
            "StableDiffusionAdapterPipeline and their StableDiffusionXL... twins, which take from_pipe(pipe, "
            "controlnet=...) or from_pipe(pipe, adapter=...)"
        )
    others = composition.method, composition.token_positions
    if any(value is not None for value in others) or composition.record_attention is not False:
        raise ValueError("method, token_positions and record_attention need concepts; name some with concepts=[...]")


def refuse_unknown(names: Iterable[str], call: Callable[..., Any]) -> None:
    """Refuses unknown arguments, and suggests similar ones; raises TypeError for the first unknown argument."""
    known = [name for name, p in signature(call).parameters.items() if p.kind is not p.VAR_KEYWORD]
    for name in names:
        how = " generator=torch.Generator().manual_seed(4) is seed 4" if name == "seed" else ""
        raise TypeError(f"unknown argument {name!r}{did_you_mean(name, known[1:])}{how}")


def check_arguments(given: Mapping[str, Any], in_attention: Collection[str], *, image_prompts: bool) -> None:
    """Refuses arguments that cannot be combined with concepts.

    Args:
        given: The arguments of a call, by name.
        in_attention: Arguments of attention processors that can be combined with concepts.
        image_prompts: Whether IP-Adapters can be.

    Raises:
        TypeError: For unknown arguments.
        ValueError: For all others.
    """
    if given["kwargs"]:
        raise TypeError(f"unknown arguments: {', '.join(given['kwargs'])}")
    if not image_prompts and any("ip_adapter" in name and it is not None for name, it in given.items()):
        raise ValueError("IP-Adapter images can be combined with concepts on Stable Diffusion 1.x, 2.x and XL only")
    for name in ATTENTION_ARGUMENTS:
        if others := (given.get(name) or {}).keys() - set(in_attention):
            raise ValueError(
                f"{name} {sorted(others)} cannot be combined with concepts; only "
                f"{' and '.join(map(repr, in_attention))} can"
            )


def tensors_for(callback: object, tensors: Sequence[str] | None) -> list[str]:
    """Names of the tensors for a callback, None for none; diffusers' own callbacks have a list."""
    diffusers_own = isinstance(callback, PipelineCallback | MultiPipelineCallbacks)
    return list((callback.tensor_inputs if diffusers_own else tensors) or ())


_CUT_WITH_GUIDANCE = {"prompt_embeds", "add_text_embeds", "add_time_ids", *OF_INPAINTING}
"""Tensors from which callbacks written for diffusers remove the unconditional rows when they switch guidance off."""


def check_changed(offered: Mapping[str, Any], returned: Mapping[str, Any], *, cut: bool) -> None:
    """Checks what a callback has changed, by the tensors that it could have, and whether it has ended guidance.

    Raises ValueError for others than the latents, but for tensors that have lost their unconditional rows.
    """
    changed = {name for name, value in returned.items() if value is not offered.get(name)} - {"latents"}
    if changed and not (changed <= _CUT_WITH_GUIDANCE and cut):
        raise ValueError(
            f"the callback changed {', '.join(sorted(changed))}; with concepts it may change latents or switch "
            "guidance off, since the positions of the concepts' words in other embeddings are unknown"
        )


def listed(prompt: str | list[str] | None) -> list[str]:
    """One prompt or several as a list."""
    return [prompt] if isinstance(prompt, str) else prompt or []


def composed(prompt: Any) -> Any:
    """A prompt or a list of them in NFC, as tokenizers read text, and as the words of concepts are; others as given."""
    if isinstance(prompt, list):
        return list(map(composed, prompt))
    return normalize("NFC", prompt) if isinstance(prompt, str) else prompt


def images_of_each(number: int | None) -> int:
    """Images of each prompt: what `num_images_per_prompt` means, None being 1; raises ValueError for less than 1."""
    if number is not None and number < 1:
        raise ValueError(f"num_images_per_prompt must be at least 1, not {number}")
    return 1 if number is None else number


def check_call(call: Call, concepts: Sequence[LoadedConcept]) -> None:
    """Checks sizes, steps, generators, negative prompts, images and regions, which diffusers does not check.

    Raises:
        ValueError: For sizes and step numbers below 1, another number of generators than images or of negative prompts
            than prompts, and regions outside the canvas.
    """
    size, sampling = call.size, call.sampling
    if size.width < 1 or size.height < 1:
        raise ValueError(f"width and height must be positive, not {size.width} x {size.height}")
    if sampling.has_schedule:
        for name, schedule in (("timesteps", sampling.timesteps), ("sigmas", sampling.sigmas)):
            if schedule is not None and not len(schedule):
                raise ValueError(f"{name} is empty; give one for each step, or leave it out")
    elif sampling.num_inference_steps is None:
        raise ValueError("num_inference_steps may be None only with timesteps or sigmas")
    elif sampling.num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, not {sampling.num_inference_steps}")
    prompts = len(call.prompts)
    images = prompts * size.images_per_prompt
    if isinstance(sampling.generator, list) and len(sampling.generator) != images:
        raise ValueError(
            f"there are {len(sampling.generator)} generators for {images} images; give one, or one for each"
        )
    for negatives in call.prompts.negative:  # for each tokenizer
        if len(negatives) not in (0, 1, prompts):
            raise ValueError(
                f"there are {len(negatives)} negative prompts and {prompts} prompts; give one, or one for each prompt"
            )
    width, height = (size.width, size.height) if call.source is None else call.source.image_size
    for loaded in concepts:
        check_region(loaded.concept, width, height)
    if call.source is not None:
        schedule = sampling.timesteps if sampling.timesteps is not None else sampling.sigmas
        steps = (sampling.num_inference_steps or 1) if schedule is None else len(schedule)
        check_steps(steps, call.source.strength, rounds_up=call.source.rounds_up)
        call.source.given.check_masks(prompts)
        images = len(call.source.pixels)
        if images not in (1, prompts):
            raise ValueError(f"there are {images} images and {prompts} prompts; give one image, or one for each prompt")


def check_latents(latents: Tensor | None, *expected: tuple[int, ...]) -> None:
    """Raises ValueError for start latents of other shapes than expected, and values that are not finite."""
    if latents is None:
        return
    if tuple(latents.shape) not in expected:
        shapes = " or ".join(str(list(shape)) for shape in expected)
        raise ValueError(f"latents have the shape {list(latents.shape)}; expected {shapes}")
    if not torch.isfinite(latents).all():
        raise ValueError("latents have NaN or infinite values; give finite ones, or leave them out")


def steps_to_record(record_attention: bool | Sequence[int], steps: int) -> frozenset[int]:
    """The steps whose maps are recorded: True is all, negatives count from the end. ValueError for others."""
    if isinstance(record_attention, bool):
        return frozenset(range(steps)) if record_attention else frozenset()
    wrong = [step for step in record_attention if not -steps <= step < steps]
    if wrong:
        raise ValueError(f"record_attention names steps {wrong}, but there are {steps}")
    return frozenset(step % steps for step in record_attention)
