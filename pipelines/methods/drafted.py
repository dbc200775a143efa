"""Steps that a method takes ahead of the real ones, from the same noise, to see where the base model puts things."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_compose.attention.device import to_device
from lora_compose.pipelines.denoising.passes import AttentionMaps, MapRequest
from lora_compose.pipelines.denoising.prepared_pass import PreparedPass
from lora_compose.pipelines.denoising.session import Session
from lora_compose.pipelines.scene.canvas import Step


@dataclass(frozen=True)
class DraftedSteps:
    """What drafted steps have shown.

    Attributes:
        maps: The attention maps of the conditional rows, of each step that is recorded.
        outputs: The model's output with guidance, of all steps but the last. Shape of each: that of the latents.
    """

    maps: Sequence[AttentionMaps]
    outputs: Sequence[Tensor]


def drafted(
    session: Session,
    latents: Tensor,
    first: Step,
    prepared: PreparedPass,
    request: MapRequest,
    length: float,
    *,
    of_last: bool = False,
    images: Sequence[int] | None = None,
) -> DraftedSteps:
    """Drafts steps, of which scheduler, generators and log see nothing.

    The last of them stops after the last layer that is recorded.

    Args:
        prepared: The pass of every step.
        request: The maps of conditional rows.
        length: Fraction of the steps, at least one step; above 1 a number of steps.
        of_last: Whether maps are recorded in the last of the steps only.
        images: Indices of the images that the pass is of; None is all.
    """
    recorded, outputs = [], []
    with session.denoiser.sampler.ahead() as sampler:
        sampler = sampler if images is None else sampler.of_images(images)
        denoiser = session.denoiser.ahead(sampler)
        *earlier, last = sampler.schedule.leading(length, first)
        for step in earlier:
            wanted = None if of_last else on_all_rows(request, prepared, step)
            prediction = denoiser.predict(latents, step, prepared, wanted)
            if prediction.maps is not None:
                recorded.append(replace(prediction.maps, text=prediction.maps.text[prediction.rows.conditional]))
            outputs.append(session.guider.combine(prediction, step))
            latents = sampler.step(outputs[-1], step, latents)
        return DraftedSteps([*recorded, denoiser.maps(latents, last, prepared, request)], outputs)


def reordered(noise: Tensor, turn: int) -> Tensor:
    """Noise with its cells in another order, the same for every turn: as good as any other, without a generator.

    Args:
        noise: Shape: [images, channels, height, width].
        turn: From 1 on.
    """
    order = torch.randperm(noise.shape[2] * noise.shape[3], generator=torch.Generator().manual_seed(turn))
    return noise.flatten(2)[..., to_device(order, noise.device)].view(noise.shape)


def on_all_rows(request: MapRequest, prepared: PreparedPass, step: Step) -> MapRequest:
    """A request for conditional rows as one for all rows of a step; unconditional ones have empty maps."""
    if not step.guided:
        return request
    roles = prepared.spec.text.roles
    tokens = request.tokens.new_zeros(len(roles), *request.tokens.shape[1:])
    tokens[roles.conditional] = request.tokens
    return replace(request, tokens=tokens)
