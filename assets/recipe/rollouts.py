"""Images that a denoiser in training makes itself, a step further with each step of the training.

A denoiser that has learnt from noised images alone has never seen what it makes itself, and its errors add up from
step to step (exposure bias: Ning et al. 2023). A teacher can be asked there as well (DAgger: Ross et al. 2011).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor

STEPS = 8, 32
"""The fewest and the most steps in which an image is made."""


class Noisy(NamedTuple):
    """Noisy images on the straight path between image and noise.

    Attributes:
        latents: Shape: [images, channels, height, width].
        times: From 0, an image, to 1, noise. Shape: [images].
        guidance: Scales. Shape: [images].
        captions: Of the images.
    """

    latents: Tensor
    times: Tensor
    guidance: Tensor
    captions: list[str]

    def first(self, count: int) -> "Noisy":
        """The first of them."""
        return Noisy(self.latents[:count], self.times[:count], self.guidance[:count], self.captions[:count])

    def with_first(self, others: "Noisy") -> "Noisy":
        """Noisy images with others in place of as many first ones."""
        count = len(others.times)
        latents, times, guidance = (
            torch.cat((theirs, mine[count:])) for theirs, mine in zip(others[:3], self[:3], strict=True)
        )
        return Noisy(latents, times, guidance, [*others.captions, *self.captions[count:]])


@dataclass
class Rollout:
    """Unfinished images.

    Attributes:
        noisy: As far as they are.
        strides: The time of a step of each. Shape: [images].
    """

    noisy: Noisy
    strides: Tensor

    @classmethod
    def of(cls, noisy: Noisy, rng: Generator) -> "Rollout":
        """Images that begin as noised ones, so that there are all times from the first step on."""
        return cls(noisy, _strides(len(noisy.times), rng))

    def advance(self, velocity: Tensor, new: Noisy, rng: Generator) -> None:
        """An Euler step. Finished images are replaced by noise, with a new caption and guidance.

        Args:
            velocity: Noise minus image. Shape: that of the latents.
            new: Has captions and guidance of images that begin.
            rng: For their noise and their numbers of steps.
        """
        old, others = self.noisy, _strides(len(velocity), rng)
        latents, times = old.latents - self.strides.view(-1, 1, 1, 1) * velocity, old.times - self.strides
        ended = times < self.strides / 2
        noise = torch.randn(velocity.shape, generator=rng)
        self.noisy = Noisy(
            torch.where(ended.view(-1, 1, 1, 1), noise, latents), torch.where(ended, 1.0, times),
            torch.where(ended, new.guidance, old.guidance),
            [new.captions[i] if over else old.captions[i] for i, over in enumerate(ended.tolist())],
        )  # fmt: skip
        self.strides = torch.where(ended, others, self.strides)


def _strides(count: int, rng: Generator) -> Tensor:
    least, most = STEPS
    return 1 / torch.randint(least, most + 1, (count,), generator=rng)
