"""FLUX.3 with concepts: texts padded to multiples of 80 tokens, which the transformer reads; guided and distilled.

diffusers has FLUX.3 as two modular pipelines. Ours have the same components but the prompt upsampler, which rewrites
prompts with a language model of its own; a call without concepts is the modular pipeline's own.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import Flux3Transformer2DModel
from diffusers.loaders import Flux3LoraLoaderMixin
from diffusers.modular_pipelines.flux3 import (
    Flux3AutoBlocks,
    Flux3DistilledAutoBlocks,
    Flux3DistilledModularPipeline,
    Flux3ModularPipeline,
)
from diffusers.modular_pipelines.flux3.encoders import Flux3TextEncoderStep
from diffusers.modular_pipelines.flux3.image_processor import Flux3ImageProcessor
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad, pixel_unshuffle

from lora_compose.attention.backbones.joint import PATCH, packed
from lora_compose.attention.device import dtype_of, uncompiled
from lora_compose.pipelines.calls.call import Call, listed
from lora_compose.pipelines.calls.front import Begun, Request, arguments_with, front
from lora_compose.pipelines.calls.resolved_call import ResolvedCall, resolve_sets
from lora_compose.pipelines.denoising.guidance import ClassifierFree
from lora_compose.pipelines.denoising.inputs import ByImage
from lora_compose.pipelines.denoising.sampler import Schedule
from lora_compose.pipelines.families.flow_matching import for_images, tokenizer_of
from lora_compose.pipelines.families.flux2_vae import Flux2VaePipeline
from lora_compose.pipelines.families.modular import ModularFamilyPipeline
from lora_compose.pipelines.families.references import ReferencesPipeline, reference_images
from lora_compose.pipelines.images.from_image import FromImage
from lora_compose.pipelines.text.templates import TemplateTokenizer

LAYERS = (4, 8, 12, 16, 20, 24, 28, 32)
"""Layers of the text encoder that are read side by side."""
PAD_MULTIPLE: int = Flux3TextEncoderStep().pad_multiple
"""Texts are padded to a multiple of so many tokens."""
MOST_TOKENS = 8192
_ARGUMENTS: Mapping[str, Any] = {
    "prompt": None, "image": None, "negative_prompt": None, "max_sequence_length": MOST_TOKENS,
    "text_encoder_out_layers": LAYERS, "num_images_per_prompt": 1, "height": None, "width": None, "latents": None,
    "generator": None, "num_inference_steps": 50, "sigmas": None, "attention_kwargs": None, "output_type": "pil",
    "guidance_scale": 3.5, "return_dict": True, "callback_on_step_end": None,
    "callback_on_step_end_tensor_inputs": ("latents",),
}  # fmt: skip
"""Inputs of diffusers' modular pipeline, and those of pipelines and guiders."""
_OF_GUIDANCE = ("negative_prompt", "attention_kwargs", "guidance_scale")
_DISTILLED = {name: it for name, it in _ARGUMENTS.items() if name not in _OF_GUIDANCE} | {"num_inference_steps": 16}


class Flux3Calls(ReferencesPipeline, Flux2VaePipeline, ModularFamilyPipeline):
    """Calls of both pipelines.

    Args:
        tokenizer: The processor of the text encoder.
        text_encoder: Qwen3-VL.
        transformer: The denoiser.
        vae: FLUX.2's.
    """

    architecture = "flux-3"
    transformer_class = Flux3Transformer2DModel
    blocks_class: ClassVar[Any]
    one_prompt = True
    model_cpu_offload_seq = "text_encoder->transformer->vae"

    def __init__(self, tokenizer: Any, text_encoder: Any, transformer: Any, vae: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, transformer=transformer, vae=vae, scheduler=scheduler
        )
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = Flux3ImageProcessor()

    @classmethod
    def _blocks(cls) -> Any:
        blocks = cls.blocks_class()
        del blocks.sub_blocks["prompt_upsampler"]
        return blocks

    def _flux3_request(self, begun: Begun, guidance_scale: float, **inputs: Any) -> Request:
        """The request of a call with concepts.

        Args:
            guidance_scale: 1 is no guidance.
            inputs: Further arguments of every forward pass.
        """
        given = begun.given
        self._check_composed_arguments(given, guidance_scale)
        prompt, negative_prompt = listed(given["prompt"]), given.get("negative_prompt")
        references, crop = self._references(given["reference"])
        size = self._size(given["width"], given["height"])
        if references and given["width"] is None and given["height"] is None:
            size = references[0].shape[-1], references[0].shape[-2]
        else:
            crop = None
        own = [loaded.concept for loaded in resolve_sets(self, begun.composition.concepts, len(prompt))[0]]
        texts = [*prompt, *listed(negative_prompt), *(text for it in own for text in (it.prompt, it.negative_prompt))]
        length = min(given["max_sequence_length"], max(self._tokens(text or "") for text in texts))

        def encode(words: Any, embeds: Any, mask: Any, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
            return for_images(self._encoded(words, length, given["text_encoder_out_layers"]), begun.images_per_prompt)

        return self._text_request(
            begun, begun.prompts(length), ClassifierFree(guidance_scale), encode, size=size,
            references=references, inputs=inputs, properties={"_guidance_scale": guidance_scale},
            reference_crop=crop,
        )  # fmt: skip

    def _plain_arguments(self, arguments: dict[str, Any], start: FromImage | None) -> dict[str, Any]:
        latents = arguments["latents"]
        if latents is not None and latents.shape[1] != self.transformer.config.in_channels:
            arguments["latents"] = pixel_unshuffle(latents, PATCH)
        arguments = super()._plain_arguments(arguments, start)
        if isinstance(arguments["prompt"], list) and len(arguments["prompt"]) == 1:  # diffusers takes no lists
            arguments["prompt"] = arguments["prompt"][0]
        return arguments

    def _further_inputs(self, call: Call, schedule: Schedule) -> Mapping[str, Any]:
        inputs = super()._further_inputs(call, schedule)
        if not self.transformer.config.flow_map:
            return inputs
        return {**inputs, "timesteps": ByImage(torch.stack(list(schedule.timesteps))[None])}

    def _tokens(self, text: str) -> int:
        """Tokens of a text in the template, with their padding."""
        words = self._template(MOST_TOKENS)
        return math.ceil(len(words.tokenizer(words.render(text)).input_ids) / PAD_MULTIPLE) * PAD_MULTIPLE

    def _encoded(
        self, texts: Sequence[str], length: int, layers: tuple[int, ...] = LAYERS
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Texts padded to a length, and how many of their tokens are read: a multiple of 80, or all."""
        each = [
            Flux3TextEncoderStep._get_qwen3_vl_prompt_embeds(
                self.text_encoder, tokenizer=self.tokenizer, prompt=text, device=self._execution_device,
                max_sequence_length=length, pad_multiple=PAD_MULTIPLE, hidden_states_layers=layers,
            )
            for text in texts
        ]  # fmt: skip
        read = [text.shape[1] for text in each]
        rows = [pad(text, (0, 0, 0, length - tokens)) for text, tokens in zip(each, read, strict=True)]
        return torch.cat(rows).to(dtype_of(uncompiled(self.transformer))), {"read": torch.tensor(read)}

    def read_texts(self, prompts: Sequence[str], length: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """As `FlowMatchingPipeline.read_texts`; by itself it pads all of them as the longest needs, and cuts at 512."""
        return self._encoded(prompts, length or min(512, max(map(self._tokens, prompts))))

    def size_from(self, images: Sequence[Image.Image]) -> tuple[int, int]:
        """As `ReferencesPipeline.size_from`: that of the first one, as it is read."""
        (first, *_), _ = self._references(images)
        return first.shape[-1], first.shape[-2]

    def _references(self, given: Any) -> tuple[list[Tensor], tuple[int, int, int, int] | None]:
        """Reference images, prepared as diffusers does: one is kept whole, several are cut to whole tokens.

        Beside them the part that is not padding if there is one alone: left, top, right and bottom. Raises ValueError
        for tensors.
        """
        images = reference_images(given)
        mode = "fill" if len(images) == 1 else "crop"
        prepared = [self.image_processor.preprocess(image, resize_mode=mode) for image in images]
        return [image for image, _ in prepared], prepared[0][1]["reference_crop"] if prepared else None

    def reference_tokens(self, references: Sequence[Tensor]) -> Tensor:
        """As `ReferencesPipeline.reference_tokens`."""
        return torch.cat([packed(self.latents_of(image.to(self._execution_device))) for image in references], dim=1)

    def _norm(self, like: Tensor) -> tuple[Tensor, Tensor]:
        norm, eps = self.vae.bn, self.vae.config.batch_norm_eps
        mean, std = (numbers.view(1, -1, 1, 1) for numbers in (norm.running_mean, norm.running_var))
        return mean.to(like), torch.sqrt(std + eps).to(like)  # rounded after the root, as in diffusers

    def _template(self, length: int) -> TemplateTokenizer:
        words = tokenizer_of(self.tokenizer)
        return TemplateTokenizer(words, self._chat_template(), length, length, pads=False)

    def _shift(self, tokens: int, steps: int) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None  # the scheduler's own, whatever the size

    def _noise(self, call: Call, resolved: ResolvedCall, dtype: torch.dtype) -> Tensor:
        return super()._noise(call, resolved, torch.float32).to(dtype)  # drawn in fp32, as in diffusers

    def _returned(self, latents: Tensor) -> Tensor:
        return pixel_unshuffle(latents, PATCH)


class ComposeFlux3Pipeline(Flux3Calls, Flux3LoraLoaderMixin):
    """The components of diffusers' `Flux3ModularPipeline`, in calls that may name concepts."""

    family = "FLUX.3"
    modular_class = Flux3ModularPipeline
    blocks_class = Flux3AutoBlocks

    @front(arguments_with(**_ARGUMENTS))
    def __call__(self, begun: Begun) -> Request:
        """Generates images; arguments are the inputs of diffusers' modular pipeline, and `guidance_scale` its guider's.

        Latents have the shape [images, channels, height, width]; those of diffusers, with patches as channels, are
        taken too, and are what `output_type="latent"` returns.

        Args:
            prompt: Read as it is, without the prompt upsampler. Several prompts need concepts.
            image: One or several reference images, of any sizes; LoRAs act on them only if a concept says so
                (`Concept.references`), and regions are those of the image that is made. Without width and height, that
                has the size of the first one.
            sigmas: Noise levels of the steps; `timesteps`, which diffusers takes too, are not taken.
            guidance_scale: 1 is no guidance. Less than 1 is for calls without concepts.
            callback_on_step_end: For calls with concepts; modular pipelines have no callbacks.
            token_positions: Refused, since there are no prompt embeddings to give.
            record_attention: Maps come from the last third of the blocks that text and image share.
            mask_image: Not supported, as are the three arguments after it.
        """
        given = begun.given
        return self._flux3_request(begun, given["guidance_scale"], attention_kwargs=given["attention_kwargs"])


class ComposeFlux3DistilledPipeline(Flux3Calls, Flux3LoraLoaderMixin):
    """The components of diffusers' `Flux3DistilledModularPipeline`, in calls that may name concepts."""

    family = "FLUX.3 distilled"
    modular_class = Flux3DistilledModularPipeline
    blocks_class = Flux3DistilledAutoBlocks

    @front(arguments_with(**_DISTILLED))
    def __call__(self, begun: Begun) -> Request:
        """Generates images, as `ComposeFlux3Pipeline.__call__`; there is neither guidance nor a negative prompt.

        Args:
            image: One or several reference images.
            mask_image: Not supported, as are the three arguments after it.
        """
        return self._flux3_request(begun, 1.0)

    def guided(self, scale: float, negative_prompt: str | None) -> dict[str, Any]:
        """As `ImageTasksPipeline.guided`: nothing, since guidance is distilled into the model."""
        if negative_prompt is not None:
            raise ValueError(f"{self.family} reads no negative prompt; leave it out")
        return {}
