"""Whole pipelines of a published structure with random weights: what they cost is that of the real model."""

from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lora_compose.compose.benchmark.architectures import CLIP_L, SD15, VAE
from lora_compose.compose.playground.assets import playground_model
from lora_compose.compose.support.names import STRUCTURES
from lora_compose.pipelines.families.stable_diffusion import ComposeStableDiffusionPipeline
from lora_compose.pipelines.families.stable_diffusion_xl import ComposeStableDiffusionXLPipeline

TOKENS = 77


def random_pipeline(name: str, device: torch.device | str, dtype: torch.dtype) -> Any:
    """A pipeline of one of `STRUCTURES`: UNet and text encoder of full size, a small vocabulary and a small VAE."""
    if name not in STRUCTURES:
        raise ValueError(f"there is no structure {name!r}; expected {', '.join(STRUCTURES)}")
    torch.manual_seed(0)
    tokenizer = _tokenizer(TOKENS)
    text = CLIPTextConfig(
        **CLIP_L, vocab_size=len(tokenizer), max_position_embeddings=TOKENS, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(**SD15).eval()
    family: Any = ComposeStableDiffusionPipeline
    pipe = family(
        vae=_small_vae(),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=tokenizer,
        unet=_with_numbers(unet.to(dtype).to_empty(device=device)),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device, dtype)


def scheduler() -> DDIMScheduler:
    """The scheduler of models without files."""
    return DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)


def pipeline_of(unet: UNet2DConditionModel, scheduler: Any, tokens: int = TOKENS, text_encoder: Any = None) -> Any:
    """A pipeline that can plan calls: tokenizers and these models, but no others."""
    with torch.device("meta"):
        vae = _small_vae()
    nothing: Any = None
    parts: dict[str, Any] = {"unet": unet, "scheduler": scheduler, "text_encoder": text_encoder, "vae": vae}
    tokenizer = _tokenizer(tokens)
    if unet.config["addition_embed_type"] == "text_time":
        return ComposeStableDiffusionXLPipeline(
            **parts, text_encoder_2=nothing, tokenizer=tokenizer, tokenizer_2=tokenizer, add_watermarker=False
        )
    return ComposeStableDiffusionPipeline(
        **parts, tokenizer=tokenizer, safety_checker=nothing, feature_extractor=nothing, requires_safety_checker=False
    )


def _small_vae() -> AutoencoderKL:
    return AutoencoderKL(**{**VAE, "block_out_channels": (8,) * 4, "norm_num_groups": 4}).eval()


def _tokenizer(tokens: int) -> Any:
    return CLIPTokenizer.from_pretrained(playground_model() / "tokenizer", model_max_length=tokens)


def _with_numbers(model: nn.Module) -> Any:
    """Fills weights with small random numbers that repeat: drawing a billion of them takes longer than an image."""
    numbers = 0.02 * torch.randn(2**16)
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        for start in range(0, len(flat), len(numbers)):
            part = flat[start : start + len(numbers)]
            part.copy_(numbers[: len(part)])
    return model
