"""A small FLUX.2-klein pipeline of real components."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinInpaintPipeline,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from torch import Tensor

from lora_compose.pipelines.families.flux2 import ComposeFlux2KleinPipeline
from made_once import made_once
from qwen import qwen3, qwen_tokenizer, without_zeros
from transformer_families import Family, Places

LAYERS = (0, 1, 3)


def flux2_transformer(**changes: Any) -> Flux2Transformer2DModel:
    """Two double-stream and two single-stream blocks of width 32."""
    config: dict[str, Any] = {
        "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 72, "timestep_guidance_channels": 32, "axes_dims_rope": (4, 4, 4, 4),
        "guidance_embeds": False,
    }  # fmt: skip
    return without_zeros(Flux2Transformer2DModel(**config | changes))


def flux2_vae(levels: int = 4, size: int = 128) -> Any:
    """A VAE of four channels, with 8 pixels per latent cell and side unless it has other `levels`."""
    vae = AutoencoderKLFlux2(
        block_out_channels=(8,) * levels, down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels, layers_per_block=1, latent_channels=4, norm_num_groups=4,
        sample_size=size,
    )  # fmt: skip
    norm: Any = vae.bn
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    return vae.eval()


@made_once
def flux2_pipeline(cls: Any = ComposeFlux2KleinPipeline, **changes: Any) -> Any:
    """A FLUX.2-klein pipeline of small real components."""
    torch.manual_seed(0)
    words = qwen_tokenizer()
    pipe = cls(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=flux2_vae(),
        text_encoder=qwen3(len(words)),
        tokenizer=words,
        transformer=flux2_transformer(**changes),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def default_klein(*, distilled: bool = False) -> Any:
    """A small FLUX.2-klein whose text encoder has the 9th, 18th and 27th layer that calls read by default."""
    pipe = flux2_pipeline()
    pipe.register_modules(text_encoder=qwen3(len(pipe.tokenizer), layers=28))
    pipe.register_to_config(is_distilled=distilled)
    return pipe


def saved_klein(folder: Path, *, distilled: bool = False) -> Path:
    """A small FLUX.2-klein in a folder."""
    default_klein(distilled=distilled).save_pretrained(folder)
    return folder


def gate(name: str, x: Tensor, places: Places) -> Tensor:
    """Where a LoRA acts in a layer of FLUX.2."""
    if "modulation" in name or name.startswith(("time", "norm_out")):
        return places.modulation
    text = ("context_embedder", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff_context")
    if any(part in name for part in text):
        return places.text
    joint, (tokens, cells) = name.startswith("single"), (places.text.shape[1], places.image.shape[1])
    image = places.image.repeat(1, (x.shape[1] - joint * tokens) // cells, 1)  # with a reference image, twice
    return torch.cat([places.text, image], dim=1) if joint else image


# After "<|im_start|>", "user" and a line break: "a", " ", "s", "k", "s", " cat", " and", " a", " ", "z", "w", "x", ...
FLUX2 = Family(
    pipeline=flux2_pipeline,
    plain=Flux2KleinPipeline,
    gate=gate,
    words=((5, 6, 7), (12, 13, 14)),
    guided={"guidance_scale": 2.0, "text_encoder_out_layers": LAYERS},
    unguided={"guidance_scale": 1.0, "text_encoder_out_layers": LAYERS},
    image_tasks={True: Flux2KleinInpaintPipeline},
    by_default=default_klein,
)
