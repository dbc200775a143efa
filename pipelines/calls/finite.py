"""Looks once at the end of a call whether its result is numbers, and names the likely cause if it is not."""

from collections.abc import Iterable

import torch
from torch import Tensor

from lora_compose.attention.device import dtype_of
from lora_compose.pipelines.calls.resolved_call import ResolvedCall
from lora_compose.pipelines.scene.scene import Concept
from lora_compose.pipelines.scene.strength import largest_factor

_USUAL = 2.0  # weights up to here are no likely cause


class NotFiniteError(ValueError):
    """An image that would be made of NaN or infinite values, which look black."""


def check_finite(latents: Tensor, causes: Iterable[str]) -> None:
    """Waits for the final latents of a call. Raises NotFiniteError if they have NaN or infinite values."""
    if not torch.isfinite(latents).all():
        raise NotFiniteError(
            f"the final latents are NaN or infinite, so there is no image. Likely causes: {'; '.join(causes)}"
        )


def check_decoded(images: Tensor) -> None:
    """Checks images that were decoded from finite latents; raises NotFiniteError if they have NaN."""
    if torch.isnan(images).any():
        raise NotFiniteError(
            f"the VAE made NaN of finite latents, so there is no image. It runs in {_name(images.dtype)}: decode in "
            "float32 (pipe.vae.to(torch.float32), or --dtype float32), or use a VAE that was made for this precision"
        )


def likely_causes(resolved: ResolvedCall) -> Iterable[str]:
    """What may have made the latents of a call with concepts NaN or infinite, the likeliest first."""
    embeds, concepts = resolved.call.prompts.embeds, resolved.concepts.concepts
    if embeds is not None and not torch.isfinite(embeds).all():
        yield "prompt_embeds has NaN or infinite values"
    strongest = max(concepts, key=_strength)
    if _strength(strongest) > _USUAL:
        yield f"the weight of concept {strongest.name!r} reaches {_strength(strongest):g}; usual are -1 to {_USUAL:g}"
    yield from causes_of_precision(dtype_of(resolved.canvas.backbone.model))
    yield f"very large numbers in the LoRA of {' or '.join(repr(concept.name) for concept in concepts)}"


def causes_of_precision(dtype: torch.dtype) -> Iterable[str]:
    """The precision of a model, if it holds small numbers only."""
    if dtype == torch.float16:
        yield "float16 holds numbers up to 65504 only; open the model in bfloat16 or float32"


def _strength(concept: Concept) -> float:
    return largest_factor(concept.weight, concept.blocks)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
