"""Tasks: where the latents start, and what happens to them after a step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor

from lora_compose.pipelines.scene.canvas import Step

OF_INPAINTING = ("mask", "masked_image_latents")
"""Tensors that diffusers gives callbacks of inpainting with a UNet."""


class Task(Protocol):
    """The start latents of a call, and what is restored after each step."""

    def start(self) -> Tensor:
        """The latents before the first step. Shape: [images, channels, height, width]."""
        ...

    def after_step(self, latents: Tensor, step: Step, scheduler: Any) -> Tensor:
        """The latents after a step of a scheduler, with restored parts (inpainting)."""
        ...

    def of_images(self, images: Sequence[int]) -> "Task":
        """The task of some images of the batch, whose latents have started already."""
        ...


@dataclass(frozen=True)
class TextToImage:
    """Starts from noise, scaled for the scheduler, and restores nothing."""

    noise: Callable[[], Tensor]

    def start(self) -> Tensor:
        """The start noise."""
        return self.noise()

    def after_step(self, latents: Tensor, step: Step, scheduler: Any) -> Tensor:
        """The latents as they are."""
        return latents

    def of_images(self, images: Sequence[int]) -> "TextToImage":
        """The task itself, which keeps nothing of an image."""
        return self


@dataclass(frozen=True, eq=False)
class ImageToImage:
    """Starts from a noised image and restores nothing.

    Attributes:
        latents: Latents of the image with the noise of the first step. Shape: [images, channels, height, width].
        inputs: Further arguments of every forward pass; tensors are marked (`ByImage`, `OnGrid`).
    """

    latents: Tensor
    inputs: Mapping[str, Any] = field(default_factory=dict)

    def start(self) -> Tensor:
        """The image with noise on it."""
        return self.latents

    def after_step(self, latents: Tensor, step: Step, scheduler: Any) -> Tensor:
        """The latents as they are."""
        return latents

    def of_images(self, images: Sequence[int]) -> "ImageToImage":
        """The task of some images of the batch."""
        return replace(self, latents=self.latents[images])


@dataclass(frozen=True, eq=False)
class Inpainting(ImageToImage):
    """Starts from an image and repaints a part of it.

    Models made for inpainting get mask and image as further channels. For others, latents outside of the mask are
    restored after every step, with the noise of the next one.

    Attributes:
        mask: 1 where the image is painted. Shape: [images, 1, height, width].
        masked: Latents of the image without what is painted, for callbacks. Shape: as the latents.
        image: Latents of the image; None for models made for inpainting. Shape: as the latents.
        noise: The noise on these latents. Shape: as the latents.
        timesteps: Timesteps of all passes.
    """

    mask: Tensor = field(kw_only=True)
    masked: Tensor | None = field(kw_only=True, default=None)
    image: Tensor | None = field(kw_only=True)
    noise: Tensor = field(kw_only=True)
    timesteps: Any = field(kw_only=True)

    def after_step(self, latents: Tensor, step: Step, scheduler: Any) -> Tensor:
        """The latents with the image outside of the mask, at the noise level at which the scheduler is now."""
        if self.image is None:
            return latents
        outside = self.image
        if step.index < step.count - 1:
            following = self.timesteps[step.index + 1 : step.index + 2]
            if hasattr(scheduler, "scale_noise"):
                outside = scheduler.scale_noise(outside, following, self.noise)
            else:
                outside = scheduler.add_noise(outside, self.noise, following)
        return (1 - self.mask) * outside + self.mask * latents

    def of_images(self, images: Sequence[int]) -> "Inpainting":
        """The task of some images of the batch."""
        latents, mask, noise = (_of(value, images) for value in (self.latents, self.mask, self.noise))
        image = None if self.image is None else _of(self.image, images)
        return replace(self, latents=latents, mask=mask, image=image, noise=noise)


def _of(rows: Tensor, images: Sequence[int]) -> Tensor:
    """Values of some images; a single value is for all."""
    return rows if len(rows) == 1 else rows[images]
