"""What the pipelines with a UNet have in common: sizes, start noise and inputs of distilled models."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lora_compose.pipelines.base import ComposePipeline
from lora_compose.pipelines.call import Call, Guidance, Sampling, check_latents
from lora_compose.pipelines.canvas import Canvas
from lora_compose.pipelines.plan import Plan

OLD_CALLBACK = {"callback", "callback_steps"}
"""Arguments that diffusers takes beside those that it names."""


class UNetPipeline(ComposePipeline):
    """A composing pipeline of the Stable Diffusion families."""

    # What diffusers' pipelines of these families have.
    prepare_latents: Any
    prepare_extra_step_kwargs: Any
    get_guidance_scale_embedding: Any

    def _size(self, width: int | None, height: int | None) -> tuple[int, int]:
        """Width and height in pixels; None means the model's own."""
        sample: Any = self.unet.config["sample_size"]
        own_height, own_width = (sample, sample) if isinstance(sample, int) else sample
        scale = self.vae_scale_factor
        return own_width * scale if width is None else width, own_height * scale if height is None else height

    def _check_latents(self, call: Call, canvas: Canvas) -> None:
        check_latents(call.sampling.latents, (canvas.images, self.unet.config.in_channels, *canvas.latent_grid))

    def _noise(self, call: Call, plan: Plan, dtype: torch.dtype) -> Tensor:
        return self.prepare_latents(
            plan.canvas.images, self.unet.config.in_channels, call.size.height, call.size.width, dtype,
            plan.canvas.device, call.sampling.generator, call.sampling.latents,
        )  # fmt: skip

    def _step_arguments(self, sampling: Sampling) -> Mapping[str, Any]:
        return self.prepare_extra_step_kwargs(sampling.generator, sampling.eta)

    def _inputs(
        self, guidance: Guidance, images: int, cross_attention_kwargs: dict[str, Any] | None
    ) -> Mapping[str, Any]:
        """Further arguments of every forward pass."""
        inputs: dict[str, Any] = {"cross_attention_kwargs": cross_attention_kwargs}
        width = self.unet.config.time_cond_proj_dim
        if width is not None:  # distilled models take the guidance scale as an input
            embedding = self.get_guidance_scale_embedding(
                torch.tensor(guidance.scale - 1).repeat(images), embedding_dim=width
            )
            inputs["timestep_cond"] = embedding.to(device=self._execution_device, dtype=self.unet.dtype)
        return inputs
