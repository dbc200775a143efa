"""Qwen-Image with concepts: the prompt in a chat template whose beginning is dropped, guidance that keeps norms."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import QwenImageImg2ImgPipeline, QwenImageInpaintPipeline, QwenImagePipeline, QwenImageTransformer2DModel
from torch import Tensor
from torch.nn.functional import pad

from lora_compose.attention.backbones.joint import PATCH
from lora_compose.pipelines.calls.front import Begun, Request, front
from lora_compose.pipelines.denoising.guidance import TokenNorms
from lora_compose.pipelines.families.flow_matching import TemplatePipeline
from lora_compose.pipelines.families.image_tasks import ImageTask
from lora_compose.pipelines.families.video_vae import VideoVaePipeline
from lora_compose.pipelines.images.from_image import Source
from lora_compose.pipelines.scene.canvas import Step
from lora_compose.pipelines.support.notes import warn
from lora_compose.pipelines.text.conditioning import Conditioning
from lora_compose.pipelines.text.templates import TemplateTokenizer


class QwenImageCalls(VideoVaePipeline, TemplatePipeline):
    """Calls of Qwen-Image and of its edit models, which have the same transformer."""

    transformer_class = QwenImageTransformer2DModel
    reads = (
        "true_cfg_scale", "negative_prompt", "sigmas", "prompt_embeds", "prompt_embeds_mask",
        "negative_prompt_embeds", "negative_prompt_embeds_mask", "attention_kwargs", "max_sequence_length",
    )  # fmt: skip
    starts_from_latents = False  # diffusers reads them with a frame axis

    def _qwen_request(
        self,
        begun: Begun,
        size: tuple[int, int],
        tokens: int,
        encoded: Callable[..., tuple[Tensor, dict[str, Tensor]]],
        *,
        tokenizers: Sequence[TemplateTokenizer] | None = None,
        source: Source | None = None,
        references: Sequence[Tensor] = (),
    ) -> Request:
        """The request of a call with concepts, of this width and height in pixels and so many tokens of every text.

        `encoded` takes texts and their number of tokens to the input of the model, with options as `encode_prompt`.
        Tokenizers of None are the pipeline's.
        """
        self._check_inputs(begun, size)
        begun = _with_padded_embeds(begun, tokens)
        given = begun.given

        def encode(words: Any, embeds: Any, mask: Any, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
            return encoded(
                words, tokens, device=device, num_images_per_prompt=begun.images_per_prompt, prompt_embeds=embeds,
                prompt_embeds_mask=mask,
            )  # fmt: skip

        return self._text_request(
            begun, begun.prompts(tokens, tokenizers=tokenizers), TokenNorms(self._guidance(given), PATCH), encode,
            size=size, source=source, references=references, inputs={"attention_kwargs": given["attention_kwargs"]},
        )  # fmt: skip

    def _tokens(self, given: Mapping[str, Any], length: int) -> int:
        """Tokens of every text: so many; with embeddings as many as these have, or as a negative text may have."""
        embeds = given["prompt_embeds"]
        if embeds is None:
            return length
        return embeds.shape[1] if given["negative_prompt"] is None else max(embeds.shape[1], length)

    def guided(self, scale: float, negative_prompt: str | None) -> dict[str, Any]:
        """As `ImageTasksPipeline.guided`; nothing to avoid is a space, as in diffusers' examples."""
        return {"true_cfg_scale": scale, "negative_prompt": negative_prompt or " "}

    def _guidance(self, given: Mapping[str, Any]) -> float:
        """The scale of classifier-free guidance; 1 if there is none."""
        if self.transformer.config.guidance_embeds:
            raise ValueError("diffusers cannot run a Qwen-Image with distilled guidance (guidance_embeds is true)")
        if (distilled := given["guidance_scale"]) is not None:
            warn(f"guidance_scale={distilled:g} is not read by Qwen-Image; give true_cfg_scale and a negative_prompt")
        unguided = given["negative_prompt"] is None and given["negative_prompt_embeds"] is None
        return 1.0 if unguided else given["true_cfg_scale"]

    def _cfg_scale(self, step: Step) -> float:
        return step.cfg_scale  # diffusers' callbacks cannot change it

    def _text_for_callbacks(self, text: Conditioning) -> dict[str, Tensor]:
        return {"prompt_embeds": text.conditional().prompt_embeds}


def _with_padded_embeds(begun: Begun, tokens: int) -> Begun:
    """The call with its embeddings padded to a number of tokens."""
    embeds, mask = begun.given["prompt_embeds"], begun.given["prompt_embeds_mask"]
    if embeds is None or embeds.shape[1] == tokens:
        return begun
    text, further = padded(embeds, mask, tokens)
    return replace(begun, given={**begun.given, "prompt_embeds": text, "prompt_embeds_mask": further["text_mask"]})


def padded(text: Tensor, mask: Tensor | None, tokens: int) -> tuple[Tensor, dict[str, Tensor]]:
    """A text and its mask, padded to a number of tokens; all of a text without a mask are seen."""
    mask = text.new_ones(text.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    missing = tokens - text.shape[1]
    return pad(text, (0, 0, 0, missing)), {"text_mask": pad(mask, (0, missing))}


class ComposeQwenImagePipeline(QwenImageCalls, QwenImagePipeline):  # pyright: ignore[reportIncompatibleMethodOverride]
    """diffusers' `QwenImagePipeline` whose calls may name concepts; latents keep their height and width, unpacked."""

    family = "Qwen-Image"
    architecture = "qwen-image"
    image_to_image = ImageTask(QwenImageImg2ImgPipeline, resizes=True)
    inpainting = ImageTask(QwenImageInpaintPipeline, resizes=True)

    @front(QwenImagePipeline.__call__)
    def __call__(self, begun: Begun) -> Request:
        """Generates images, as `ComposePipeline.__call__`.

        Latents have the shape [images, channels, height, width]; packed ones, as diffusers has them, are taken too.
        With concepts, `output_type="latent"` returns them packed, as diffusers does.

        Args:
            negative_prompt: Without one, or negative embeddings, there is no guidance, as in diffusers.
            guidance_scale: Not read, as in diffusers: no model of this family has distilled guidance.
            max_sequence_length: With concepts texts are also padded to so many tokens; no pass runs the padding.
            token_positions: Positions among the tokens that the model reads, those after the dropped beginning.
            record_attention: Maps come from the last third of the blocks.
        """
        source, size = self._source(begun)
        tokens = self._tokens(begun.given, begun.given["max_sequence_length"])
        return self._qwen_request(begun, size, tokens, self._encoded, source=source)

    def read_texts(self, prompts: Sequence[str], length: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """As `FlowMatchingPipeline.read_texts`; the padding is masked."""
        return self._encoded(list(prompts), length or 512, device=self._execution_device)

    def _encoded(self, words: str | list[str] | None, tokens: int, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The text and its mask, cut or padded to a number of tokens; diffusers pads to the longest of a batch."""
        text, mask = self.encode_prompt(words, max_sequence_length=tokens, **options)
        return padded(text, mask, tokens)

    def _template(self, length: int) -> TemplateTokenizer:
        dropped = self.prompt_template_encode_start_idx
        return TemplateTokenizer(self.tokenizer, self.prompt_template_encode.format, length + dropped, length, dropped)
