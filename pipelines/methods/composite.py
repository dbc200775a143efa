"""LoRA Composite, from Multi-LoRA Composition for Image Generation (arXiv 2402.16843).

In every step each of the k LoRAs, alone in the model, predicts without and with the prompt, and the guided predictions
are averaged. With theta_j for the model with LoRA j, guidance scale s and prompt c,

    e = (1/k) sum_j w_j [e_theta_j(z) + s (e_theta_j(z, c) - e_theta_j(z))]

Styles have no passes of their own: they act in those of every subject.

Guidance is linear, so averaging first and guiding once gives the same, and `guidance_rescale` then sees the averages.

`docs/methods/composite.md` says what differs from the authors' code and why.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_compose.pipelines.engine import Engine
from lora_compose.pipelines.methods.process import Alone, alone, say_once, say_unread_by_passes


@dataclass(frozen=True)
class Composite:
    """The average of what the model predicts with each LoRA alone.

    Attributes:
        shares: How much each subject's prediction counts, in the order of the concepts; the paper's w_j up to a common
            factor, as only ratios matter. None: all the same, w_j = 1.
    """

    shares: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if self.shares is not None and not _proper(self.shares):
            raise ValueError(f"shares must be numbers of which none is negative and not all are 0, not {self.shares!r}")

    def start(self, engine: Engine) -> "Average":
        """What every LoRA needs for its passes; text encoders take part."""
        if any(concept.region for concept in engine.concepts):
            say_once("composite has no use for regions; method='regional' has")
        if engine.differ and self.shares is not None:
            raise ValueError("composite can have shares only if all prompts have the same concepts")
        numbers = [max(1, len(mine)) for mine in engine.subjects_of]
        shares = [1.0] * numbers[0] if self.shares is None else self.shares
        if self.shares is not None and len(shares) != numbers[0]:
            raise ValueError(f"composite has {len(shares)} shares, but there are {numbers[0]} {_passes(engine)}")
        say_unread_by_passes(engine)
        passes = [alone(engine, [mine[n : n + 1] for mine in engine.subjects_of]) for n in range(max(numbers))]
        if engine.differ:
            of_prompts = [[1 / number if n < number else 0.0 for number in numbers] for n in range(len(passes))]
        else:
            of_prompts = [[share / sum(shares)] * len(numbers) for share in shares]
        by_image = torch.tensor(of_prompts).repeat_interleave(engine.images_per_prompt, dim=1)
        return Average(engine, passes, by_image[..., None, None, None].to(engine.device))


@dataclass(frozen=True)
class Average:
    """The process of `Composite`.

    Attributes:
        engine: Runs the UNet.
        alone: What a pass with each LoRA alone needs.
        shares: How much each pass counts for each image; their sum is 1, so that the average is again a prediction of
            the noise. Shape: [passes, images, 1, 1, 1].
    """

    engine: Engine
    alone: Sequence[Alone]
    shares: Tensor

    def prepare(self, latents: Tensor) -> Tensor:
        """Nothing is to be prepared."""
        return latents

    def step(self, latents: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """One pass per LoRA, one after the other, so that memory does not grow with their number.

        Prompts of one call that have different concepts share passes: the nth is of the nth concept of each.
        """
        passes = [self.engine.unet(latents, t, one.conditioning, one.gates) for one in self.alone]
        images = self.shares.shape[1]
        weighted = [
            (share.to(one.model_output.dtype) * one.model_output.unflatten(0, (-1, images))).flatten(0, 1)
            for share, one in zip(self.shares, passes, strict=True)
        ]
        return latents, self.engine.guide(replace(passes[0], model_output=torch.stack(weighted).sum(dim=0)))


def _passes(engine: Engine) -> str:
    """What has a pass."""
    return "concepts" if len(engine.subjects) == len(engine.concepts) else "passes: styles have none of their own"


def _proper(shares: object) -> bool:
    return (
        isinstance(shares, list | tuple)
        and all(type(share) in (int, float) and math.isfinite(share) and share >= 0 for share in shares)
        and sum(shares) > 0
    )
