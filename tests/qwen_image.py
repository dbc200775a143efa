"""A small Qwen-Image pipeline of real components."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageImg2ImgPipeline,
    QwenImageInpaintPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from torch import Tensor

from lora_compose.pipelines.families.qwen_image import ComposeQwenImagePipeline
from made_once import made_once
from qwen import qwen2_5_vl, qwen_tokenizer, without_zeros
from transformer_families import Family, Places


def qwen_image_transformer(**changes: Any) -> QwenImageTransformer2DModel:
    """Three blocks of width 32."""
    config: dict[str, Any] = {
        "in_channels": 16, "out_channels": 4, "num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 24, "axes_dims_rope": (4, 6, 6),
    }  # fmt: skip
    return without_zeros(QwenImageTransformer2DModel(**config | changes))


def qwen_image_vae(levels: int = 4, size: int = 128) -> Any:
    """A VAE of four channels, with 8 pixels per latent cell and side unless it has other `levels`."""
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1] * levels, num_res_blocks=1, latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 2.0, 1.0, 0.5], temperal_downsample=[False] * (levels - 3) + [True, True],
    )  # fmt: skip
    vae.register_to_config(sample_size=size)
    return vae.eval()


def qwen_image_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The scheduler of Qwen-Image, without the stretched end."""
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=256, max_image_seq_len=8192
    )


@made_once
def qwen_image_pipeline(cls: Any = ComposeQwenImagePipeline, **changes: Any) -> Any:
    """A Qwen-Image pipeline of small real components."""
    torch.manual_seed(0)
    words = qwen_tokenizer()
    pipe = cls(
        scheduler=qwen_image_scheduler(),
        vae=qwen_image_vae(),
        text_encoder=qwen2_5_vl(len(words)),
        tokenizer=words,
        transformer=qwen_image_transformer(**changes),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def gate(name: str, x: Tensor, places: Places) -> Tensor:
    """Where a LoRA acts in a layer of Qwen-Image."""
    if name.startswith(("time", "norm_out")) or "_mod." in name:
        return places.modulation
    if any(part in name for part in ("txt", "add_")):
        return places.text[:, : x.shape[1]]  # diffusers pads texts to the longest alone
    return places.image


# As Krea 2, after the 34 tokens of the same template.
QWEN_IMAGE = Family(
    pipeline=qwen_image_pipeline,
    plain=QwenImagePipeline,
    gate=gate,
    words=((2, 3, 4), (9, 10, 11)),
    guided={"negative_prompt": "the photo", "true_cfg_scale": 2.0},
    image_tasks={False: QwenImageImg2ImgPipeline, True: QwenImageInpaintPipeline},
)
