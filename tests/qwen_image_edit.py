"""Small Qwen-Image-Edit-Plus pipelines of real components: those of Qwen-Image, and the processor that reads images."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers import QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as diffusers_own
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from transformers import ProcessorMixin, Qwen2VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from lora_compose.pipelines.families.qwen_image_edit import ComposeQwenImageEditPlusPipeline
from qwen import qwen2_5_vl, qwen_tokenizer
from qwen_image import QWEN_IMAGE, qwen_image_scheduler, qwen_image_transformer, qwen_image_vae
from qwen_image import gate as gate_of_text_and_image
from transformer_families import Places

# diffusers reads references in 1024 x 1024 pixels, which takes small models minutes.
diffusers_own.VAE_IMAGE_SIZE, diffusers_own.CONDITION_IMAGE_SIZE = 80 * 80, 56 * 56
NAVY, ORANGE = Image.new("RGB", (64, 100), "navy"), Image.new("RGB", (80, 64), "orange")
REFERENCE_TOKENS = 4 * 6 + 6 * 4
"""Tokens of the two reference images above, at that size."""
WORDS = (
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain how "
    "the user's text instruction should alter or modify the image. Generate a new image that meets the user's "
    "requirements while maintaining consistency with the original input where appropriate. Picture"
)
VISION = {"vision_start_token_id": "<|vision_start|>", "image_token_id": "<|image_pad|>"}


class ImageProcessor(Qwen2VLProcessor):
    """Qwen's processor without its part for videos, which needs torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        self.image_token, self.image_token_id = "<|image_pad|>", tokenizer.convert_tokens_to_ids("<|image_pad|>")
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def image_processor(words: Any) -> ImageProcessor:
    """Qwen's processor with a tokenizer that has its tokens for images."""
    return ImageProcessor(Qwen2VLImageProcessorPil(), words)


def qwen_image_edit_pipeline(cls: Any = ComposeQwenImageEditPlusPipeline, **changes: Any) -> Any:
    """A Qwen-Image-Edit-Plus pipeline of small real components."""
    torch.manual_seed(0)
    words = qwen_tokenizer(WORDS)
    marks = [*VISION.values(), "<|vision_end|>", "<|video_pad|>"]
    words.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *marks]})
    ids = {name: words.convert_tokens_to_ids(token) for name, token in VISION.items()}
    video = words.convert_tokens_to_ids("<|video_pad|>")
    pipe = cls(
        scheduler=qwen_image_scheduler(),
        vae=qwen_image_vae(),
        text_encoder=qwen2_5_vl(len(words), video_token_id=video, **ids),
        tokenizer=words,
        processor=image_processor(words),
        transformer=qwen_image_transformer(**changes),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def gate(name: str, x: Tensor, places: Places) -> Tensor:
    """Where a LoRA acts: as in Qwen-Image, and nowhere on references unless `places` have cells for these, too."""
    image = pad(places.image, (0, 0, 0, REFERENCE_TOKENS))[:, : 64 + REFERENCE_TOKENS]
    if len(x) == 2 * len(places.modulation):  # for references at timestep 0
        return torch.cat([places.modulation, places.modulation * image[:, -1]])
    return gate_of_text_and_image(name, x, replace(places, image=image))


# After the 64 tokens of the template: "Picture", " ", "1", ":", " ", "<|vision_start|>", 6 tokens, "<|vision_end|>",
# the second image with 4, "a", " ", "s", "k", "s", " cat", ...
QWEN_IMAGE_EDIT = replace(
    QWEN_IMAGE,
    pipeline=qwen_image_edit_pipeline,
    plain=QwenImageEditPlusPipeline,
    gate=gate,
    words=((26, 27, 28), (33, 34, 35)),
    guided={**QWEN_IMAGE.guided, "image": [NAVY, ORANGE]},
    unguided={"image": [NAVY, ORANGE]},
    image_tasks={},
)
QWEN_IMAGE_EDIT_2511 = replace(QWEN_IMAGE_EDIT, pipeline=partial(qwen_image_edit_pipeline, zero_cond_t=True))
