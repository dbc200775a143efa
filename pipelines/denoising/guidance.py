"""Guidance: combines the predictions of a pass into the one for the scheduler.

With the predictions u of unconditional rows and c of conditional ones, and the scale s,

    classifier-free     g = u + s (c - u)
    rescaled            g std(c) / std(g) in the share r, g in the rest (Lin et al., arXiv 2305.08891, section 3.4)
    norm of tokens      g |c| / |g|, the norm of each patch of 2 x 2 cells (Qwen-Image)
    by step             s is another one in each step (Ideogram 4)
    norm limited        g min(1, n |c| / |g|), the norm of the whole image, and g = c near the end (Z-Image)

A family makes its guider from the arguments of its own calls; methods only call `Session.guider`.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor
from torch.linalg import vector_norm

from lora_compose.pipelines.denoising.passes import Prediction
from lora_compose.pipelines.scene.canvas import Step


class Guider(Protocol):
    """How the predictions of a pass become the one for the scheduler."""

    @property
    def scale(self) -> float:
        """The scale s at the start of a call; 1 or less is no guidance, so that there are conditional rows only."""
        ...

    def unguided(self, timesteps: Sequence[Tensor] | Tensor) -> Collection[int]:
        """Indices of the timesteps of a call in which there is no guidance, whatever the scale."""
        ...

    def combine(self, prediction: Prediction, step: Step) -> Tensor:
        """The guided prediction of a pass with one branch. Shape: [images, channels, height, width]."""
        ...


@dataclass(frozen=True)
class Embedded:
    """The model takes the scale as an input, and there are conditional rows only."""

    scale = 1.0

    def unguided(self, timesteps: Sequence[Tensor] | Tensor) -> Collection[int]:
        """No timesteps: the scale is the same in all steps."""
        return ()

    def combine(self, prediction: Prediction, step: Step) -> Tensor:
        """The model's own prediction."""
        return prediction.model_output


@dataclass(frozen=True)
class ClassifierFree:
    """Classifier-free guidance; `scale` is s at the start of a call."""

    scale: float

    def unguided(self, timesteps: Sequence[Tensor] | Tensor) -> Collection[int]:
        """No timesteps: the scale is the same in all steps."""
        return ()

    def combine(self, prediction: Prediction, step: Step) -> Tensor:
        """The guided prediction, corrected."""
        uncond, cond = (part.flatten(0, 1) for part in prediction.branches)
        if not len(uncond):
            return cond
        return self.corrected(uncond + step.cfg_scale * (cond - uncond), cond)

    def corrected(self, guided: Tensor, cond: Tensor) -> Tensor:
        """The guided prediction after what a guider does beyond this formula. Shapes: as the latents."""
        return guided


@dataclass(frozen=True)
class ScaleByStep:
    """Classifier-free guidance with a scale s for every step."""

    scales: tuple[float, ...]

    @property
    def scale(self) -> float:
        """The largest scale of a step."""
        return max(self.scales)

    def unguided(self, timesteps: Sequence[Tensor] | Tensor) -> Collection[int]:
        """The timesteps whose scale is 1."""
        return frozenset(index for index, scale in enumerate(self.scales) if scale == 1)

    def combine(self, prediction: Prediction, step: Step) -> Tensor:
        """The guided prediction."""
        uncond, cond = (part.flatten(0, 1) for part in prediction.branches)
        if not len(uncond):
            return cond
        scale = self.scales[step.index]
        return scale * cond + (1 - scale) * uncond


@dataclass(frozen=True)
class Rescaled(ClassifierFree):
    """The standard deviation of each image is drawn to that without guidance; `share` is r, `guidance_rescale`."""

    share: float = 0.0

    def corrected(self, guided: Tensor, cond: Tensor) -> Tensor:
        """Guidance mixed with its rescaled version in the share r."""
        return rescale_noise_cfg(guided, cond, guidance_rescale=self.share) if self.share > 0 else guided


@dataclass(frozen=True)
class TokenNorms(ClassifierFree):
    """Every token of the image, a patch of so many cells per side, keeps the norm that it has without guidance."""

    patch: int = 2

    def corrected(self, guided: Tensor, cond: Tensor) -> Tensor:
        """Guided predictions with the norms of the conditional rows."""
        tokens, kept = (self._tokens(prediction) for prediction in (guided, cond))
        norms = [vector_norm(values, dim=(1, 3, 5), keepdim=True) for values in (kept, tokens)]
        return (tokens * (norms[0] / _positive(norms[1]))).flatten(4, 5).flatten(2, 3)

    def _tokens(self, images: Tensor) -> Tensor:
        """Shape: [images, channels, rows of tokens, patch, columns of tokens, patch]."""
        return images.unflatten(3, (-1, self.patch)).unflatten(2, (-1, self.patch))


@dataclass(frozen=True)
class NormLimited(ClassifierFree):
    """The norm of each image is limited, and late steps have no guidance.

    Attributes:
        limit: n, diffusers' `cfg_normalization`; 0 is no limit.
        until: Share of the noise schedule after which there is no guidance, diffusers' `cfg_truncation`.
    """

    limit: float = 0.0
    until: float = 1.0

    def unguided(self, timesteps: Sequence[Tensor] | Tensor) -> Collection[int]:
        """The passes after `until`; timestep t lies at the share 1 - t / 1000."""
        shares = ((1000 - torch.stack([*timesteps]).float()) / 1000).tolist()  # compared in the precision of diffusers
        return frozenset(index for index, share in enumerate(shares) if share > self.until)

    def corrected(self, guided: Tensor, cond: Tensor) -> Tensor:
        """The prediction with norms that are at most n times those of the conditional rows."""
        if self.limit <= 0:
            return guided
        limit_norm, norm = (vector_norm(prediction, dim=(1, 2, 3), keepdim=True) for prediction in (cond, guided))
        return guided * (self.limit * limit_norm / _positive(norm)).clamp(max=1)


def _positive(norms: Tensor) -> Tensor:
    return norms.clamp(min=torch.finfo(norms.dtype).tiny)
