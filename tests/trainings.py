"""Small models, images and settings for the tests of training."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image

import components
from anima import ANIMA
from chroma import CHROMA
from components import TINY, TINY_XL, sd_unet, sdxl_unet, small_pipeline
from flux import FLUX
from flux2 import FLUX2
from flux2_dev import FLUX2_DEV, mistral3
from flux3 import FLUX3, default_flux3
from flux_kontext import KONTEXT
from ideogram4 import IDEOGRAM4
from krea2 import KREA2
from lora_compose.compose.training import TaraTraining, Training
from qwen import qwen3
from qwen_image import QWEN_IMAGE
from qwen_image_edit import QWEN_IMAGE_EDIT, QWEN_IMAGE_EDIT_2511
from transformer_families import Family
from z_image import Z_IMAGE

SIDE = 32  # pixels of the training images
TRAINED = {
    "Chroma": CHROMA, "FLUX.1": FLUX, "FLUX.2": FLUX2, "Ideogram 4": IDEOGRAM4, "Krea 2": KREA2, "Z-Image": Z_IMAGE,
    "Qwen-Image": QWEN_IMAGE, "FLUX.1 Kontext": KONTEXT, "Anima": ANIMA, "FLUX.3": FLUX3,
}  # fmt: skip
"""Families of transformers that are trained by tests."""
PAIRED = {
    "FLUX.1 Kontext": (KONTEXT, 1), "FLUX.2-klein": (FLUX2, 2), "FLUX.2-dev": (FLUX2_DEV, 2),
    "Qwen-Image-Edit-Plus": (QWEN_IMAGE_EDIT, 2), "Qwen-Image-Edit-2511": (QWEN_IMAGE_EDIT_2511, 2),
    "FLUX.3": (FLUX3, 2),
}  # fmt: skip
"""Families that are trained with reference images, and how many each training image has there."""


def trained_pipeline(family: Family) -> Any:
    """A small pipeline whose text encoder has the layers that training reads, which it cannot be told."""
    pipe = default_flux3() if family is FLUX3 else family.pipeline()
    torch.manual_seed(0)
    if family is FLUX2:
        pipe.text_encoder = qwen3(len(pipe.tokenizer), layers=28)
    if family is FLUX2_DEV:
        pipe.text_encoder = mistral3(len(pipe.tokenizer.tokenizer), layers=31)
    return pipe


def xl_pipeline(unet: UNet2DConditionModel | None = None) -> StableDiffusionXLPipeline:
    """An SDXL pipeline of diffusers with a tiny UNet; the tokenizers of its text encoders differ in their padding."""
    return components.xl_pipeline(StableDiffusionXLPipeline, unet or sdxl_unet(**TINY_XL))


def sd_pipeline(unet: UNet2DConditionModel | None = None) -> Any:
    """A Stable Diffusion pipeline of diffusers with a tiny UNet."""
    return small_pipeline(StableDiffusionPipeline, unet or sd_unet(**TINY))


def paint_folder(folder: Path, number: int = 3, size: tuple[int, int] = (SIDE, SIDE)) -> Path:
    """Images of one colour each, with some noise."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(number)
    for i in range(number):
        pixels = np.clip(rng.integers(0, 255, 3) + rng.normal(0, 20, (size[1], size[0], 3)), 0, 255)
        Image.fromarray(pixels.astype("u1")).save(folder / f"{i}.png")
    return folder


def training(folder: Path, model: Path | str, **fields: Any) -> Training:
    """Four steps on the images in `folder/images`."""
    given: dict[str, Any] = {
        "images": folder / "images", "out": folder / "cat.safetensors", "trigger": "sks", "class_word": "cat",
        "model": str(model), "resolution": SIDE, "steps": 4, "rank": 2, "learning_rate": 1e-2, "batch_size": 2,
        "checkpoint_every": 2, "cpu": True,
    }  # fmt: skip
    return Training(**{**given, **fields})


TARA = TaraTraining()
