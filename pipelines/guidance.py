"""Guidance: combines the predictions of a pass into the one for the scheduler."""

from dataclasses import dataclass

from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor

from lora_compose.pipelines.canvas import Step
from lora_compose.pipelines.passes import Prediction


@dataclass(frozen=True)
class Guider:
    """Classifier-free guidance: uncond + s (cond - uncond), s the scale of the step.

    Attributes:
        rescale: As diffusers' `guidance_rescale` (arXiv 2305.08891, section 3.4).
    """

    rescale: float = 0.0

    def combine(self, prediction: Prediction, step: Step) -> Tensor:
        """The guided prediction of a pass with one branch. Shape: [images, channels, height, width]."""
        if not prediction.num_uncond:
            return prediction.model_output
        uncond, cond = prediction.model_output.chunk(2)
        guided = uncond + step.cfg_scale * (cond - uncond)
        if self.rescale > 0:
            guided = rescale_noise_cfg(guided, cond, guidance_rescale=self.rescale)
        return guided
