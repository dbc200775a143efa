"""Small models, pictures and settings for the tests of training."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from components import TINY, sd_unet, sdxl_unet, small_pipeline
from lora_compose.compose.playground.assets import playground_model
from lora_compose.compose.training import TaraTraining, Training

SIDE = 32  # pixels of the training pictures
XL_TINY = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "layers_per_block": 1,
    "attention_head_dim": (2, 4),
}


def xl_pipeline(unet: UNet2DConditionModel | None = None) -> StableDiffusionXLPipeline:
    """An SDXL pipeline of small real components: two text encoders whose tokenizers differ in their padding."""
    first = small_pipeline(StableDiffusionPipeline)
    tokenizers = [CLIPTokenizer.from_pretrained(playground_model() / "tokenizer", pad_token=pad) for pad in (None, "!")]
    config: dict[str, Any] = {
        "vocab_size": len(first.tokenizer), "hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 32, "bos_token_id": first.tokenizer.bos_token_id,
        "eos_token_id": first.tokenizer.eos_token_id, "projection_dim": 12,
    }  # fmt: skip
    torch.manual_seed(1)
    pipe = StableDiffusionXLPipeline(
        vae=first.vae,
        text_encoder=CLIPTextModel(CLIPTextConfig(**config, pad_token_id=first.tokenizer.pad_token_id)).eval(),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**config, pad_token_id=0)).eval(),
        tokenizer=first.tokenizer,
        tokenizer_2=tokenizers[1],
        unet=unet or sdxl_unet(**XL_TINY),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear"),  # pyright: ignore[reportArgumentType]
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd_pipeline(unet: UNet2DConditionModel | None = None) -> Any:
    """A Stable Diffusion pipeline of diffusers with a tiny UNet."""
    return small_pipeline(StableDiffusionPipeline, unet or sd_unet(**TINY))


def paint_folder(folder: Path, number: int = 3, size: tuple[int, int] = (SIDE, SIDE)) -> Path:
    """Pictures of one colour each, with some noise."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(number)
    for i in range(number):
        pixels = np.clip(rng.integers(0, 255, 3) + rng.normal(0, 20, (size[1], size[0], 3)), 0, 255)
        Image.fromarray(pixels.astype("u1")).save(folder / f"{i}.png")
    return folder


def training(folder: Path, model: Path | str, **fields: Any) -> Training:
    """Four steps on the pictures in `folder/pictures`."""
    given: dict[str, Any] = {
        "pictures": folder / "pictures", "out": folder / "cat.safetensors", "trigger": "sks", "class_word": "cat",
        "model": str(model), "resolution": SIDE, "steps": 4, "rank": 2, "learning_rate": 1e-2, "batch_size": 2,
        "checkpoint_every": 2, "cpu": True,
    }  # fmt: skip
    return Training(**{**given, **fields})


TARA = TaraTraining()
