"""Krea 2 with concepts: the prompt in a chat template whose beginning is dropped, several layers of it as the text."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import Krea2Pipeline, Krea2Transformer2DModel
from torch import Tensor

from lora_compose.attention.backbones.joint import packed
from lora_compose.pipelines.calls.call import Concepts, Generators, GivenPrompts, check_arguments, listed, tensors_for
from lora_compose.pipelines.calls.front import Plain, Request, front
from lora_compose.pipelines.control import Control
from lora_compose.pipelines.denoising.guidance import ClassifierFree
from lora_compose.pipelines.denoising.process import Process
from lora_compose.pipelines.families.base import ComposePipeline
from lora_compose.pipelines.families.flow_matching import (
    TemplatePipeline,
    both_sides,
    check_negative_embeds,
    texts_to_encode,
)
from lora_compose.pipelines.families.video_vae import channel_norm, latents_of_image
from lora_compose.pipelines.methods import Settings
from lora_compose.pipelines.text.conditioning import Conditioning, TokenPositions
from lora_compose.pipelines.text.templates import TemplateTokenizer


class ComposeKrea2Pipeline(TemplatePipeline, Krea2Pipeline):  # pyright: ignore[reportIncompatibleMethodOverride]
    """diffusers' `Krea2Pipeline` whose calls may name concepts; latents keep their height and width, unpacked."""

    family = "Krea 2"
    architecture = "krea-2"
    transformer_class = Krea2Transformer2DModel
    most_tokens = 6400

    @front
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int = 1024,
        width: int = 1024,
        num_inference_steps: int = 28,
        sigmas: list[float] | None = None,
        guidance_scale: float = 4.5,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_embeds_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds_mask: Tensor | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = ("latents",),
        attention_kwargs: dict[str, Any] | None = None,
        max_sequence_length: int = 512,
        *,
        concepts: Concepts | None = None,
        method: str | Settings | None = None,
        control: Control | Sequence[Control] | None = None,
        token_positions: TokenPositions | None = None,
        record_attention: bool | Sequence[int] = False,
        image: Any = None,
        mask_image: Any = None,
        strength: float | None = None,
        padding_mask_crop: int | None = None,
        paste_original: bool = False,
        **kwargs: Any,
    ) -> Request | Plain:
        """Generates images, as `ComposePipeline.__call__`.

        Latents have the shape [images, channels, height, width]; packed ones, as diffusers has them, are taken too.
        With concepts, `output_type="latent"` returns them packed, as diffusers does.

        Args:
            method: The name of a method without gradients (`lora-compose methods`), or settings.
            control: Not supported yet.
            token_positions: Positions among the tokens that the model reads, those after the dropped beginning.
            record_attention: Maps come from the last third of the blocks.
            image: Refused, as are the four arguments after it: diffusers has no image-to-image for this family.
        """
        asked = dict(locals())
        begun = self._begin(asked)
        if begun.plain is not None:
            return begun.plain
        prompt = begun.prompt
        check_arguments(kwargs, (), attention_kwargs, "attention_kwargs")
        tensors = tensors_for(callback_on_step_end, callback_on_step_end_tensor_inputs)
        height, width = (-self._rounded(-side) for side in (height, width))  # up, as diffusers does
        self.check_inputs(
            prompt, height=height, width=width, negative_prompt=negative_prompt, prompt_embeds=prompt_embeds,
            prompt_embeds_mask=prompt_embeds_mask, negative_prompt_embeds=negative_prompt_embeds,
            negative_prompt_embeds_mask=negative_prompt_embeds_mask, callback_on_step_end_tensor_inputs=tensors,
            max_sequence_length=max_sequence_length,
        )  # fmt: skip
        cfg_scale = self._cfg_of(guidance_scale)
        embeds = None if prompt_embeds is None else prompt_embeds.flatten(2)
        texts = None if prompt is None else [listed(prompt)]
        given = GivenPrompts(texts, embeds, max_sequence_length, [listed(negative_prompt)])
        check_negative_embeds(given, negative_prompt_embeds if cfg_scale > 1 else None)
        call = begun.call(
            asked, given, (width, height), num_images_per_prompt, ClassifierFree(cfg_scale),
            inputs={"attention_kwargs": attention_kwargs},
            properties={
                "_guidance_scale": guidance_scale, "_attention_kwargs": attention_kwargs, "_current_timestep": None,
            },
        )  # fmt: skip

        def encode(prompts: list[str] | None, negative: bool, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
            words, embeds, mask = texts_to_encode(asked, prompt, prompts, len(given), negative=negative)
            encode_prompt: Any = self.encode_prompt  # its annotations know no missing prompt
            text, mask = encode_prompt(
                words, device=device, num_images_per_prompt=num_images_per_prompt, prompt_embeds=embeds,
                prompt_embeds_mask=mask, max_sequence_length=max_sequence_length,
            )  # fmt: skip
            return text.flatten(2), {"text_mask": mask}

        def decode(latents: Tensor, process: Process) -> tuple[Any]:
            return (self._decode(latents, output_type or "np"),)

        return Request(call, partial(both_sides, encode, guided=cfg_scale > 1), decode, return_dict)

    def read_texts(self, prompts: Sequence[str], length: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """As `FlowMatchingPipeline.read_texts`; layers lie side by side."""
        encode_prompt: Any = self.encode_prompt
        text, mask = encode_prompt(list(prompts), device=self._execution_device, max_sequence_length=length or 512)
        return text.flatten(2), {"text_mask": mask}

    def latents_of(self, pixels: Tensor) -> Tensor:
        """As `FlowMatchingPipeline.latents_of`; each channel is normalised apart."""
        return latents_of_image(self.vae, pixels)

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

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return packed(latents)
        latents = latents[:, :, None].to(self.vae.dtype)
        mean, std = channel_norm(self.vae, latents)
        image = self.vae.decode(latents * std + mean, return_dict=False)[0][:, :, 0]
        return self._postprocess(image, output_type)


ComposePipeline.families.append(ComposeKrea2Pipeline)
