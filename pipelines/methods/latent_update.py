"""Updates of latents along the gradient of a loss on attention maps."""

from typing import Literal

from torch import Tensor

StepRule = Literal["raw", "rms"]
"""How a gradient becomes a direction: as it is ("raw"), or scaled to root mean square 1 for each image ("rms")."""


def descend(latents: Tensor, gradient: Tensor, size: float, rule: StepRule, active: Tensor | None = None) -> Tensor:
    """One update: z <- z - size * direction.

    Args:
        latents: Shape: [images, channels, height, width].
        gradient: Gradient of the loss, fp32. Shape: as the latents.
        size: Step size.
        rule: How the gradient becomes a direction.
        active: True for images to update; None means all. Shape: [images].
    """
    if rule == "rms":
        gradient = gradient / gradient.square().mean(dim=(1, 2, 3), keepdim=True).sqrt().clamp(min=1e-12)
    change = size * gradient
    if active is not None:
        change = change * active[:, None, None, None]
    return (latents - change).to(latents.dtype)
