"""Qwen-Image-Edit-Plus with concepts: reference images are read beside the image, and by the text encoder."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers import QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plain
from PIL import Image
from torch import Tensor

from lora_compose.attention.backbones.joint import packed
from lora_compose.pipelines.calls.front import Begun, Request, front
from lora_compose.pipelines.families.flow_matching import tokenizer_of
from lora_compose.pipelines.families.qwen_image import QwenImageCalls, padded
from lora_compose.pipelines.families.references import ReferencesPipeline, reference_images
from lora_compose.pipelines.text.templates import TemplateTokenizer

_IMAGE = "Picture {}: <|vision_start|>{}<|vision_end|>"
"""What stands before the prompt for each reference image: its number, and its tokens."""


class ComposeQwenImageEditPlusPipeline(ReferencesPipeline, QwenImageCalls, QwenImageEditPlusPipeline):  # pyright: ignore[reportIncompatibleMethodOverride]
    """diffusers' `QwenImageEditPlusPipeline` whose calls may name concepts; latents keep height and width, unpacked."""

    family = "Qwen-Image-Edit-Plus"
    reads = (*QwenImageCalls.reads, "image")
    architecture = "qwen-image-edit"
    needs_references = True

    def _read(self, given: dict[str, Any]) -> dict[str, Any]:
        image = given["image"]
        has_image = image is not None and not (isinstance(image, list | tuple) and not image)
        self.check_has_references(has_image, ": give image; for text alone take Qwen-Image")
        return super()._read(given)

    @front(QwenImageEditPlusPipeline.__call__)
    def __call__(self, begun: Begun) -> Request:
        """Generates images, as `ComposePipeline.__call__`.

        Args:
            image: One or several reference images, of any sizes, which are the same for all images; LoRAs act on them
                only if a concept says so (`Concept.references`), and regions are those of the image that is made.
            negative_prompt: As for `ComposeQwenImagePipeline.__call__`, as is guidance.
            max_sequence_length: With concepts texts are padded to so many tokens beside those of the reference images,
                and longer ones are refused; no pass runs the padding.
            token_positions: Positions among the tokens that the model reads, those of reference images included.
            mask_image: Not supported, as are the three arguments after it.
        """
        given, images = begun.given, reference_images(begun.given["reference"])
        own_width, own_height = self.size_from(images)
        size = self._rounded(given["width"] or own_width), self._rounded(given["height"] or own_height)
        read = [self._resized(image, plain.CONDITION_IMAGE_SIZE) for image in images]
        reads_prompt, reads_negative = given["prompt_embeds"] is None, given["negative_prompt"] is not None
        shown, of_images = self._shown(read) if reads_prompt or reads_negative else ("", 0)
        tokens = self._tokens(given, given["max_sequence_length"] + of_images)
        tokenizers = [self._template(tokens, shown)] if reads_prompt else None
        return self._qwen_request(
            begun, size, tokens, partial(self._encoded, images=read), tokenizers=tokenizers,
            references=[self._prepared(image) for image in images],
        )  # fmt: skip

    def size_from(self, images: Sequence[Image.Image]) -> tuple[int, int]:
        """As `ReferencesPipeline.size_from`: the shape of the last one, with 1024 x 1024 pixels in all."""
        return plain.calculate_dimensions(1024 * 1024, ratio=images[-1].width / images[-1].height)

    def read_texts(self, prompts: Sequence[str], length: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Always raises ValueError: the text of this family has reference images (`read_beside`)."""
        raise ValueError(f"{self.family} reads no text without a reference image")

    def read_beside(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> tuple[Tensor, dict[str, Tensor]]:
        """As `ReferencesPipeline.read_beside`; the text begins with the images, and its padding is masked."""
        read = [self._resized(image, plain.CONDITION_IMAGE_SIZE) for image in images]
        tokens = 512 + self._shown(read)[1]
        return self._encoded(
            list(prompts), tokens, read, device=self._execution_device, prompt_embeds=None, prompt_embeds_mask=None
        )

    def _resized(self, image: Image.Image, area: int) -> Image.Image:
        """An image in about so many pixels, in its shape."""
        width, height = plain.calculate_dimensions(area, ratio=image.width / image.height)
        return self.image_processor.resize(image, height=height, width=width)  # pyright: ignore[reportReturnType]

    def _prepared(self, image: Image.Image) -> Tensor:
        """A reference image as the VAE reads it. Shape: [1, 3, height, width]."""
        width, height = plain.calculate_dimensions(plain.VAE_IMAGE_SIZE, ratio=image.width / image.height)
        return self.image_processor.preprocess(image, height=height, width=width)

    def reference_tokens(self, references: Sequence[Tensor]) -> Tensor:
        """As `ReferencesPipeline.reference_tokens`."""
        to: dict[str, Any] = {"device": self._execution_device, "dtype": self.vae.dtype}
        encode: Any = self._encode_vae_image
        latents = [encode(image[:, :, None].to(**to), generator=None)[:, :, 0] for image in references]
        return torch.cat([packed(image_latents) for image_latents in latents], dim=1)

    def _shown(self, images: Sequence[Image.Image]) -> tuple[str, int]:
        """The text that stands for reference images before a prompt, and its tokens: of each as many as are read."""
        grids = self.processor.image_processor(images=list(images), return_tensors="pt")["image_grid_thw"]
        counts = grids.prod(dim=-1) // self.processor.image_processor.merge_size**2
        token = self.processor.image_token
        shown = "".join(_IMAGE.format(number, token * count) for number, count in enumerate(counts.tolist(), 1))
        return shown, len(self.processor.tokenizer(shown, add_special_tokens=False).input_ids)

    def _encoded(
        self, words: str | list[str] | None, tokens: int, images: Sequence[Image.Image], **options: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Texts behind the reference images, one at a time as in diffusers, padded to a number of tokens."""
        if options["prompt_embeds"] is not None:
            text, mask = self.encode_prompt(None, **options)
            return padded(text, mask, tokens)
        each = []
        for text in [words] if isinstance(words, str) else words or ():
            embeds, mask = self.encode_prompt(text, image=list(images), **options)
            if embeds.shape[1] > tokens:
                raise ValueError(
                    f"a text has {embeds.shape[1]} tokens with its reference images, and {tokens} are read: shorten "
                    "it, or raise max_sequence_length"
                )
            each.append(padded(embeds, mask, tokens))
        return torch.cat([text for text, _ in each]), {
            "text_mask": torch.cat([further["text_mask"] for _, further in each])
        }

    def _template(self, length: int, shown: str = "") -> TemplateTokenizer:
        dropped = self.prompt_template_encode_start_idx

        def render(prompt: str) -> str:
            return self.prompt_template_encode.format(shown + prompt)

        return TemplateTokenizer(tokenizer_of(self.processor), render, length + dropped, length, dropped)
