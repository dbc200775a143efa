"""What methods share that move latents along the gradient of a loss on attention maps."""

from typing import Literal

from torch import Tensor

StepRule = Literal["raw", "rms"]
"""How a gradient becomes a direction: as it is ("raw"), or scaled to root mean square 1 for each image ("rms")."""


def descend(latents: Tensor, gradient: Tensor, size: float, rule: StepRule, active: Tensor | None = None) -> Tensor:
    """One update: z <- z - size * direction.

    Args:
        latents: Shape: [images, channels, height, width].
        gradient: Of the loss, fp32. Shape: as the latents.
        size: Step size.
        rule: How the gradient becomes a direction.
        active: Which images are updated; None is all. Shape: [images].
    """
    if rule == "rms":
        gradient = gradient / gradient.square().mean(dim=(1, 2, 3), keepdim=True).sqrt().clamp(min=1e-12)
    change = size * gradient
    if active is not None:
        change = change * active[:, None, None, None]
    return (latents - change).to(latents.dtype)
