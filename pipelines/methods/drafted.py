"""Steps that a method takes ahead of the real ones, from the same noise, to see where the base model puts things."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lora_compose.pipelines.canvas import Step
from lora_compose.pipelines.passes import AttentionMaps, MapRequest
from lora_compose.pipelines.prepared_pass import PreparedPass
from lora_compose.pipelines.session import Session


def drafted_maps(
    session: Session,
    latents: Tensor,
    first: Step,
    prepared: PreparedPass,
    request: MapRequest,
    length: float,
    *,
    of_last: bool = False,
) -> Sequence[AttentionMaps]:
    """The attention maps of drafted steps, of which scheduler, generators and log see nothing.

    The last of them stops after the last layer that is recorded.

    Args:
        session: The call.
        latents: The start noise.
        first: The first step.
        prepared: The pass of every step.
        request: The maps of conditional rows.
        length: Fraction of the steps, at least one step; above 1 a number of steps.
        of_last: Whether maps are recorded in the last of the steps only.

    Returns:
        The maps of each step that is recorded; those of unconditional rows come first and are 0.
    """
    found = []
    with session.denoiser.sampler.ahead() as sampler:
        denoiser = session.denoiser.ahead(sampler)
        *earlier, last = sampler.schedule.leading(length, first)
        for step in earlier:
            wanted = None if of_last else _on_all_rows(request, step)
            prediction = denoiser.predict(latents, step, prepared, wanted)
            if prediction.maps is not None:
                found.append(prediction.maps)
            latents = sampler.step(session.guider.combine(prediction, step), step, latents)
        return [*found, denoiser.maps(latents, last, prepared, request)]


def _on_all_rows(request: MapRequest, step: Step) -> MapRequest:
    if not step.guided:
        return request
    return replace(request, tokens=torch.cat([torch.zeros_like(request.tokens), request.tokens]))
