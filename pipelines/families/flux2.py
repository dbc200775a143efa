"""FLUX.2-klein with concepts: the prompt in a chat template, three layers of its encoder side by side as the text."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import Flux2KleinInpaintPipeline, Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from lora_compose.attention import Backbone
from lora_compose.attention.backbones.flux2 import Flux2Backbone
from lora_compose.attention.backbones.joint import PATCH
from lora_compose.pipelines.calls.call import Call
from lora_compose.pipelines.calls.front import Begun, Request, front
from lora_compose.pipelines.denoising.guidance import ClassifierFree
from lora_compose.pipelines.denoising.inputs import ByImage, OnGrid
from lora_compose.pipelines.families.flow_matching import TemplatePipeline
from lora_compose.pipelines.families.flux2_vae import Flux2VaePipeline
from lora_compose.pipelines.families.image_tasks import ImageTask
from lora_compose.pipelines.families.references import ReferencesPipeline, reference_images
from lora_compose.pipelines.images.from_image import FromImage, Source
from lora_compose.pipelines.scene.canvas import Canvas
from lora_compose.pipelines.text.templates import TemplateTokenizer


class Flux2Calls(ReferencesPipeline, Flux2VaePipeline, TemplatePipeline):
    """Calls of FLUX.2-klein and FLUX.2-dev."""

    transformer_class = Flux2Transformer2DModel
    named_channels = "num_latents_channels"
    reads = ("image", "sigmas", "prompt_embeds", "attention_kwargs", "max_sequence_length", "text_encoder_out_layers")
    starts_from_latents = False  # diffusers reads them with patches as channels

    def _flux2_request(
        self, begun: Begun, size: tuple[int, int], source: Source | None, references: Sequence[Tensor]
    ) -> Request:
        """The request of a call with concepts; `size` is that of the images in pixels."""
        given, per_prompt, length = begun.given, begun.images_per_prompt, begun.given["max_sequence_length"]
        self._check_inputs(begun, size)
        prompts_given = begun.prompts(length)

        def encode(words: Any, embeds: Any, mask: Any, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
            text, _ = self.encode_prompt(
                words, device=device, num_images_per_prompt=per_prompt, prompt_embeds=embeds,
                max_sequence_length=length, text_encoder_out_layers=given["text_encoder_out_layers"],
            )  # fmt: skip
            mask = text.new_ones(text.shape[:2], dtype=torch.bool)
            if embeds is None:
                mask = self._template(length).real_tokens(words).to(text.device).repeat_interleave(per_prompt, dim=0)
            return text, {"text_mask": mask}

        inputs = {"joint_attention_kwargs": given["attention_kwargs"]}
        return self._text_request(
            begun, prompts_given, ClassifierFree(self._cfg_of(given["guidance_scale"])), encode, size=size,
            source=source, references=references,
            inputs=inputs | self._guidance_inputs(given["guidance_scale"], len(prompts_given) * per_prompt),
        )  # fmt: skip

    def _guidance_inputs(self, scale: float, images: int) -> dict[str, ByImage]:
        """Inputs of the model for its distilled guidance, if it has any."""
        return {}

    def _sized_by_first(self, given: Mapping[str, Any], references: Sequence[Tensor]) -> tuple[int, int]:
        """Width and height in pixels of images with reference images: as named, or those of the first one."""
        height, width = references[0].shape[-2:] if references else (None, None)
        return self._size(given["width"] or width, given["height"] or height)

    def guided(self, scale: float, negative_prompt: str | None) -> dict[str, Any]:
        """As `ImageTasksPipeline.guided`."""
        if negative_prompt is not None:
            raise ValueError(f"{self.family} takes no negative prompt; leave it out")
        return {"guidance_scale": scale}

    def read_texts(self, prompts: Sequence[str], length: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """As `FlowMatchingPipeline.read_texts`."""
        text, _ = self.encode_prompt(list(prompts), device=self._execution_device, max_sequence_length=length or 512)
        return text, {}

    def size_from(self, images: Sequence[Image.Image]) -> tuple[int, int]:
        """As `ReferencesPipeline.size_from`: that of the first one, as it is read."""
        height, width = self._references(images[:1])[0].shape[-2:]
        return width, height

    def _references(self, given: Any) -> list[Tensor]:
        """References as diffusers prepares them: whole tokens, at most 1024 x 1024 pixels. ValueError for others."""
        references, unit, most = [], self.cell, 1024 * 1024
        for image in reference_images(given):
            self.image_processor.check_image_input(image)
            if image.width * image.height > most:
                image = self.image_processor._resize_to_target_area(image, target_area=most)
            width, height = (side // unit * unit for side in image.size)
            references.append(self.image_processor.preprocess(image, height=height, width=width, resize_mode="crop"))
        return references

    def reference_tokens(self, references: Sequence[Tensor]) -> Tensor:
        """As `ReferencesPipeline.reference_tokens`."""
        tokens, _ = self.prepare_image_latents(
            list(references), batch_size=1, generator=None,  # pyright: ignore[reportArgumentType]
            device=self._execution_device, dtype=self.vae.dtype,
        )  # fmt: skip
        return tokens

    def _shift(self, tokens: int, steps: int) -> float:
        return compute_empirical_mu(image_seq_len=tokens, num_steps=steps)

    def _returned(self, latents: Tensor) -> Tensor:
        return self._scaled(latents)


class ComposeFlux2KleinPipeline(Flux2Calls, Flux2KleinPipeline):  # pyright: ignore[reportIncompatibleMethodOverride]
    """diffusers' `Flux2KleinPipeline` whose calls may name concepts; latents keep their height and width, unpacked."""

    family = "FLUX.2-klein"
    reads = (*Flux2Calls.reads, "negative_prompt_embeds")
    architecture = "flux-2-klein"
    inpainting = ImageTask(Flux2KleinInpaintPipeline, resizes=False)

    @front(Flux2KleinPipeline.__call__, image_reference=(Any, None))
    def __call__(self, begun: Begun) -> Request:
        """Generates images, as `ComposePipeline.__call__`.

        Latents have the shape [images, channels, height, width]; those of diffusers, with patches as channels, are
        taken too.

        Args:
            image: With a mask, what inpainting starts from, as in the Stable Diffusion families; the model reads it as
                a reference image, too. Without a mask, one or several reference images, of any sizes; LoRAs act on them
                only if a concept says so (`Concept.references`), and regions are those of the image that is made.
            token_positions: Positions among all tokens, those of the chat template included.
            record_attention: Maps come from the single-stream blocks.
            image_reference: A further image that inpainting reads; cannot be combined with concepts yet.
        """
        given, references = begun.given, self._references(begun.given["reference"])
        if given["image_reference"] is not None:
            raise ValueError("further reference images cannot be combined with concepts in inpainting; leave them out")
        if begun.start is None:
            return self._flux2_request(begun, self._sized_by_first(given, references), None, references)
        source, size = self._source(begun)
        return self._flux2_request(begun, size, source, references)

    def backbone_of(self, call: Call) -> Backbone:
        """The backbone of a call; with a start image it reads that as a reference image, too."""
        return super().backbone_of(call) if call.source is None else Flux2Backbone(self.transformer, reference=True)

    def _check_composed(self, given: FromImage) -> None:
        if given.size[0] * given.size[1] > 1024 * 1024:
            raise ValueError(
                f"image has {given.size[0]} x {given.size[1]} pixels; {self.family} inpaints at most 1024 x 1024 in "
                "all: resize image and mask"
            )

    def _inputs_from_image(self, call: Call, image: Tensor) -> Mapping[str, Any]:
        return {"reference": OnGrid(image)}

    def _latent_mask(self, mask: Tensor, canvas: Canvas) -> Tensor:
        height, width = (side // PATCH for side in canvas.latent_grid)
        return interpolate(interpolate(mask, (height, width), mode="bilinear"), scale_factor=PATCH)

    def _template(self, length: int) -> TemplateTokenizer:
        return TemplateTokenizer(self.tokenizer, self._chat_template(enable_thinking=False), length, length)

    def _cfg_of(self, guidance_scale: float) -> float:
        return 1.0 if self.config["is_distilled"] else guidance_scale

    @property
    def unconditional_prompt(self) -> str | None:
        """As `ImageTasksPipeline.unconditional_prompt`: the base model has such rows, the distilled one has not."""
        return None if self.config["is_distilled"] else ""
