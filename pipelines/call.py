"""What is asked of a call, whatever the family, and what is refused."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor, nn

from lora_compose.attention import check_free
from lora_compose.pipelines.conditioning import TokenPositions
from lora_compose.pipelines.control import Control
from lora_compose.pipelines.engine import LoadedConcept
from lora_compose.pipelines.methods import Settings
from lora_compose.pipelines.scene import Concept, check_region

Generators = torch.Generator | list[torch.Generator] | None

Concepts = Sequence[str | Concept] | Sequence[Sequence[str | Concept]]
"""Who takes part: concepts of all prompts, or a list of concepts for each prompt."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """What is asked of a call with concepts, whatever the family.

    Attributes:
        concepts: Who takes part.
        method: How they are fused; None chooses.
        controls: What says where things are.
        texts: The prompts, as each of the tokenizers reads them; None with embeddings.
        prompt_embeds: Instead of prompts.
        token_positions: Where the concepts' words stand in them.
        record_attention: Steps of which attention maps are kept.
        width: Pixels.
        height: Pixels.
        num_inference_steps: Denoising steps; without a meaning where `timesteps` or `sigmas` are given.
        timesteps: As in diffusers, likewise all below.
        sigmas: Noise levels.
        denoising_end: The part of the denoising after which the call ends.
        guidance_scale: Classifier-free guidance; 1 or less is none.
        guidance_rescale: How much guidance is rescaled.
        images_per_prompt: How many images each prompt gets.
        eta: Of the DDIM scheduler.
        generator: Where noise comes from.
        latents: The start noise.
        output_type: What images are.
        cross_attention_kwargs: "scale", of the user's own adapters.
        clip_skip: Layers of the text encoders that are skipped.
        callback: Called after every step.
        callback_tensors: What it is given.
        started: When the call began, by `time.perf_counter()`.
    """

    concepts: Concepts
    method: str | Settings | None
    controls: Sequence[Control]
    texts: Sequence[Sequence[str]] | None
    prompt_embeds: Tensor | None
    token_positions: TokenPositions | None
    record_attention: bool | Sequence[int]
    width: int
    height: int
    num_inference_steps: int | None
    timesteps: list[int] | None
    sigmas: list[float] | None
    denoising_end: float | None = None
    guidance_scale: float
    guidance_rescale: float
    images_per_prompt: int
    eta: float
    generator: Generators
    latents: Tensor | None
    output_type: str
    cross_attention_kwargs: dict[str, Any] | None
    clip_skip: int | None
    callback: Callable | None
    callback_tensors: Sequence[str]
    started: float

    @property
    def prompts(self) -> Sequence[str] | None:
        """The prompts; None with embeddings."""
        return None if self.texts is None else self.texts[0]

    @property
    def prompt_count(self) -> int:
        """How many prompts or embeddings there are."""
        given = self.prompts if self.prompt_embeds is None else self.prompt_embeds
        return 0 if given is None else len(given)

    @property
    def has_schedule(self) -> bool:
        """Whether the timesteps or noise levels of the steps are given, and with them their number."""
        return self.timesteps is not None or self.sigmas is not None

    @property
    def lora_scale(self) -> float | None:
        """The scale of the user's own adapters."""
        return (self.cross_attention_kwargs or {}).get("scale")


def nobody(concepts: Concepts | None) -> bool:
    """Whether no concept takes part in any prompt."""
    return not concepts or all(isinstance(entry, list | tuple) and not entry for entry in concepts)


def of_prompt(
    positions: TokenPositions | None, concepts: Sequence[Concept], prompt: int, prompts: int
) -> TokenPositions | None:
    """The token positions in one prompt, of its own concepts."""
    if positions is None:
        return None
    found: dict[str, Sequence[int]] = {}
    for concept in concepts:
        given: Sequence[Any] = positions.get(concept.name, ())
        nested = bool(given) and isinstance(given[0], Sequence)
        if nested and len(given) != prompts:
            raise ValueError(f"token_positions of {concept.name!r} are for {len(given)} prompts, there are {prompts}")
        found[concept.name] = given[prompt] if nested else given
    return found


def check_plain(
    unet: nn.Module, method: object, token_positions: object, record_attention: object, controls: Sequence[Control]
) -> None:
    """Checks a call without concepts.

    Raises:
        ValueError: If something is given that needs concepts.
        RuntimeError: If concepts are installed in the UNet just now.
    """
    if controls:
        raise ValueError(
            "control needs concepts; without them, diffusers has StableDiffusionControlNetPipeline, "
            "StableDiffusionAdapterPipeline and their StableDiffusionXL... twins, which take from_pipe(pipe, "
            "controlnet=...) or from_pipe(pipe, adapter=...)"
        )
    if method is not None or token_positions is not None or record_attention is not False:
        raise ValueError("method, token_positions and record_attention need concepts; name some with concepts=[...]")
    check_free(unet)


def check_arguments(
    unknown: Mapping[str, Any], ip_adapter: Sequence[object], cross_attention_kwargs: Mapping[str, Any] | None
) -> None:
    """Refuses what cannot be combined with concepts.

    Raises:
        TypeError: For unknown arguments.
        ValueError: For IP-Adapter images, and `cross_attention_kwargs` other than "scale".
    """
    if unknown:
        raise TypeError(f"unknown arguments: {', '.join(unknown)}")
    if any(given is not None for given in ip_adapter):
        raise ValueError("IP-Adapter images cannot be combined with concepts yet")
    if others := (cross_attention_kwargs or {}).keys() - {"scale"}:
        raise ValueError(f"cross_attention_kwargs {sorted(others)} cannot be combined with concepts; only 'scale' can")


def tensors_for(callback: object, tensors: Sequence[str]) -> list[str]:
    """The tensors that a callback is given: diffusers' own callbacks name them themselves."""
    return list(callback.tensor_inputs if isinstance(callback, PipelineCallback | MultiPipelineCallbacks) else tensors)


def listed(prompt: str | list[str] | None) -> list[str]:
    """One prompt or several as a list."""
    return [prompt] if isinstance(prompt, str) else prompt or []


def check_call(call: Call, concepts: Sequence[LoadedConcept]) -> None:
    """Checks what diffusers does not.

    Raises:
        ValueError: For sizes and step numbers below 1 and for regions outside the canvas.
    """
    if call.width < 1 or call.height < 1:
        raise ValueError(f"width and height must be positive, not {call.width} x {call.height}")
    if call.has_schedule:
        for name, given in (("timesteps", call.timesteps), ("sigmas", call.sigmas)):
            if given is not None and not len(given):
                raise ValueError(f"{name} is empty; give one for each step, or leave it out")
    elif call.num_inference_steps is None:
        raise ValueError("num_inference_steps may be None only with timesteps or sigmas")
    elif call.num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, not {call.num_inference_steps}")
    for loaded in concepts:
        check_region(loaded.concept, call.width, call.height)


def steps_to_record(record_attention: bool | Sequence[int], steps: int) -> frozenset[int]:
    """The steps of which attention maps are kept: True is all, a list names some, negative ones count from the end.

    Raises:
        ValueError: For steps that there are not.
    """
    if isinstance(record_attention, bool):
        return frozenset(range(steps)) if record_attention else frozenset()
    wrong = [step for step in record_attention if not -steps <= step < steps]
    if wrong:
        raise ValueError(f"record_attention names steps {wrong}, but there are {steps}")
    return frozenset(step % steps for step in record_attention)
