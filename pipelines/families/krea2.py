"""Krea 2 with concepts: the prompt in a chat template whose beginning is dropped, several layers of it as the text."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import Krea2Pipeline, Krea2Transformer2DModel
from torch import Tensor

from lora_compose.pipelines.calls.front import Begun, Request, front
from lora_compose.pipelines.denoising.guidance import ClassifierFree
from lora_compose.pipelines.families.flow_matching import TemplatePipeline
from lora_compose.pipelines.families.video_vae import VideoVaePipeline
from lora_compose.pipelines.text.conditioning import Conditioning
from lora_compose.pipelines.text.templates import TemplateTokenizer


class ComposeKrea2Pipeline(VideoVaePipeline, TemplatePipeline, Krea2Pipeline):  # pyright: ignore[reportIncompatibleMethodOverride]
    """diffusers' `Krea2Pipeline` whose calls may name concepts; latents keep their height and width, unpacked."""

    family = "Krea 2"
    reads = (
        "negative_prompt", "sigmas", "prompt_embeds", "prompt_embeds_mask", "negative_prompt_embeds",
        "negative_prompt_embeds_mask", "attention_kwargs", "max_sequence_length",
    )  # fmt: skip
    architecture = "krea-2"
    transformer_class = Krea2Transformer2DModel
    most_tokens = 6400

    @front(Krea2Pipeline.__call__)
    def __call__(self, begun: Begun) -> Request:
        """Generates images, as `ComposePipeline.__call__`.

        Latents have the shape [images, channels, height, width]; packed ones, as diffusers has them, are taken too.
        With concepts, `output_type="latent"` returns them packed, as diffusers does.

        Args:
            token_positions: Positions among the tokens that the model reads, those after the dropped beginning.
            record_attention: Maps come from the last third of the blocks.
            image: Refused, as are the four arguments after it: diffusers has no image-to-image for this family.
        """
        given, (_, size) = begun.given, self._source(begun)
        self._check_inputs(begun, size)
        embeds = None if given["prompt_embeds"] is None else given["prompt_embeds"].flatten(2)
        prompts_given = begun.prompts(given["max_sequence_length"], embeds)

        def encode(words: Any, embeds: Any, mask: Any, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
            text, mask = self.encode_prompt(
                words, device=device, num_images_per_prompt=begun.images_per_prompt, prompt_embeds=embeds,
                prompt_embeds_mask=mask, max_sequence_length=given["max_sequence_length"],
            )  # fmt: skip
            return text.flatten(2), {"text_mask": mask}

        return self._text_request(
            begun, prompts_given, ClassifierFree(self._cfg_of(given["guidance_scale"])), encode, size=size,
            inputs={"attention_kwargs": given["attention_kwargs"]},
        )  # fmt: skip

    def _rounded(self, side: int) -> int:
        return -super()._rounded(-side)  # up, as diffusers does

    def read_texts(self, prompts: Sequence[str], length: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """As `FlowMatchingPipeline.read_texts`; layers lie side by side."""
        text, mask = self.encode_prompt(list(prompts), device=self._execution_device, max_sequence_length=length or 512)
        return text.flatten(2), {"text_mask": mask}

    def _template(self, length: int) -> TemplateTokenizer:
        dropped, suffix = self.prompt_template_encode_start_idx, self.prompt_template_encode_num_suffix_tokens
        return TemplateTokenizer(
            self.tokenizer, self.prompt_template_encode_prefix.__add__, length + dropped - suffix, length, dropped
        )

    def _cfg_of(self, guidance_scale: float) -> float:
        return 1 + max(0.0, guidance_scale)

    def _shift(self, tokens: int, steps: int) -> float:
        return 1.15 if self.config["is_distilled"] else super()._shift(tokens, steps)

    def _text_for_callbacks(self, text: Conditioning) -> dict[str, Tensor]:
        layers = self.transformer.config.num_text_layers
        return {"prompt_embeds": text.conditional().prompt_embeds.unflatten(-1, (layers, -1))}

    def _scaled(self, latents: Tensor) -> Tensor:
        latents = latents[:, :, None].to(self.vae.dtype)
        mean, std = self._channel_norm(latents)
        return latents * std + mean
