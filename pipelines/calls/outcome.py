"""The outcome of a finished call."""

from dataclasses import dataclass
from typing import Any

from lora_compose.pipelines.calls.refine import Origin
from lora_compose.pipelines.denoising.denoiser import Denoiser
from lora_compose.pipelines.images.output import ComposeOutput
from lora_compose.pipelines.methods import Choice, name_of


@dataclass(frozen=True)
class Outcome:
    """The denoiser of a finished call, with costs and recorded maps; its method; and what `refine` needs."""

    denoiser: Denoiser
    choice: Choice
    origin: Origin | None = None


def output_of(outcome: Outcome, images: Any, nsfw: Any = None) -> ComposeOutput:
    """The output of a call."""
    denoiser, choice = outcome.denoiser, outcome.choice
    method, settings = name_of(choice.method)
    recorded_steps, maps = denoiser.log.attention_maps() or (None, None)
    return ComposeOutput(
        images=images,
        nsfw_content_detected=nsfw,
        cost=denoiser.cost,
        attention_maps=maps,
        masks=denoiser.log.masks(),
        draft_maps=denoiser.log.draft_maps(),
        recorded_steps=recorded_steps,
        method=method,
        settings=settings,
        method_reason=choice.reason,
        origin=outcome.origin,
    )
