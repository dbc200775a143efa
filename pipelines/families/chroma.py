"""Chroma with concepts: FLUX.1 without CLIP and without distilled guidance, T5 with a mask."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ChromaImg2ImgPipeline, ChromaInpaintPipeline, ChromaPipeline, ChromaTransformer2DModel
from torch import Tensor

from lora_compose.pipelines.calls.front import Begun, Request, front
from lora_compose.pipelines.denoising.guidance import ClassifierFree
from lora_compose.pipelines.families.flow_matching import FlowMatchingPipeline
from lora_compose.pipelines.families.image_tasks import ImageTask
from lora_compose.pipelines.scene.canvas import Step
from lora_compose.pipelines.text.conditioning import Conditioning


class ComposeChromaPipeline(FlowMatchingPipeline, ChromaPipeline):  # pyright: ignore[reportIncompatibleMethodOverride]
    """diffusers' `ChromaPipeline` whose calls may name concepts; latents keep their height and width, unpacked."""

    family = "Chroma"
    reads = (
        "negative_prompt", "sigmas", "prompt_embeds", "negative_prompt_embeds", "prompt_attention_mask",
        "negative_prompt_attention_mask", "joint_attention_kwargs", "max_sequence_length",
    )  # fmt: skip
    architecture = "chroma"
    transformer_class = ChromaTransformer2DModel
    image_to_image = ImageTask(ChromaImg2ImgPipeline, resizes=True)
    inpainting = ImageTask(ChromaInpaintPipeline, resizes=True)

    def runs_as_diffusers(self, inpaints: bool) -> bool:
        """Inpaints only if diffusers finds FLUX.1's `guidance_embeds`, which it asks for, among the settings."""
        known = not inpaints or "guidance_embeds" in self.transformer.config
        return known and super().runs_as_diffusers(inpaints)

    @classmethod
    def opens_keys(cls, keys: Sequence[str]) -> bool:
        """Whether a checkpoint is of this family."""
        return any(key.removeprefix("model.diffusion_model.").startswith("distilled_guidance_layer.") for key in keys)

    @front(ChromaPipeline.__call__)
    def __call__(self, begun: Begun) -> Request:
        """Generates images; all arguments of diffusers' pipeline keep their meaning.

        Latents have the shape [images, channels, height, width]; packed ones, as diffusers has them, are taken too.
        With concepts, `output_type="latent"` returns them packed, as diffusers does.

        Args:
            token_positions: Positions among the T5 tokens.
            record_attention: Maps come from the single-stream blocks.
        """
        given, per_prompt, length = begun.given, begun.images_per_prompt, begun.given["max_sequence_length"]
        source, size = self._source(begun)
        self._check_inputs(begun, size)
        kwargs = given["joint_attention_kwargs"]

        def encode(words: Any, embeds: Any, mask: Any, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
            text, mask = self._encoded(
                words, device=device, num_images_per_prompt=per_prompt, prompt_embeds=embeds,
                prompt_attention_mask=mask, max_sequence_length=length, lora_scale=(kwargs or {}).get("scale"),
            )  # fmt: skip
            # From an image, diffusers reads masks of True and False as numbers.
            return text, {"text_mask": mask if source is None else mask.to(text.dtype)}

        return self._text_request(
            begun, begun.prompts(length), ClassifierFree(given["guidance_scale"]), encode, size=size, source=source,
            inputs={"joint_attention_kwargs": kwargs},
        )  # fmt: skip

    def read_texts(self, prompts: Sequence[str], length: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """As `FlowMatchingPipeline.read_texts`."""
        length = min(length or 512, self.tokenizer.model_max_length)
        text, mask = self._encoded(list(prompts), device=self._execution_device, max_sequence_length=length)
        return text, {"text_mask": mask}

    def _encoded(self, words: str | list[str] | None, **options: Any) -> tuple[Tensor, Tensor]:
        """Features of one side, and the numbers that mask them."""
        text, _, mask, *_ = self.encode_prompt(words, do_classifier_free_guidance=False, **options)
        return text, mask

    def _cfg_scale(self, step: Step) -> float:
        """As diffusers' loop, which keeps the scale that was given until a callback ends guidance."""
        return 1.0 if self.guidance_scale <= 1 else step.cfg_scale

    def _text_for_callbacks(self, text: Conditioning) -> dict[str, Tensor]:
        return {"prompt_embeds": text.conditional().prompt_embeds}
