"""A small Z-Image pipeline of real components."""

from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    ZImageImg2ImgPipeline,
    ZImageInpaintPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import Tensor

from components import small_vae
from lora_compose.pipelines.families.z_image import ComposeZImagePipeline
from made_once import made_once
from qwen import qwen3_base, qwen_tokenizer, without_zeros
from transformer_families import Family, Places


def z_image_transformer(**changes: Any) -> ZImageTransformer2DModel:
    """Three layers and two refiners of width 32."""
    config: dict[str, Any] = {
        "in_channels": 4, "dim": 32, "n_layers": 3, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
        "cap_feat_dim": 24, "axes_dims": [4, 6, 6], "axes_lens": [256, 64, 64],
    }  # fmt: skip
    return without_zeros(ZImageTransformer2DModel(**config | changes))


@made_once
def z_image_pipeline(cls: Any = ComposeZImagePipeline, **changes: Any) -> Any:
    """A Z-Image pipeline of small real components."""
    torch.manual_seed(0)
    words = qwen_tokenizer()
    pipe = cls(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=small_vae(shift_factor=0.1),
        text_encoder=qwen3_base(len(words)),
        tokenizer=words,
        transformer=z_image_transformer(**changes),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def gate(name: str, x: Tensor, places: Places) -> Tensor:
    """Where a LoRA acts in a layer of Z-Image, all of whose rows have as many tokens."""
    if "adaLN_modulation" in name or name.startswith("t_embedder"):
        return places.modulation
    if name.startswith(("layers", "all_final")):
        return torch.cat([places.image, places.text], dim=1)[:, : x.shape[1]]
    found = places.text if name.startswith(("cap", "context")) else places.image
    if x.dim() == 2:
        return found[:, : len(x) // len(found)].flatten(0, 1)
    return found[:, : x.shape[1]]


# After "<|im_start|>", "user" and a line break: "a", " ", "s", "k", "s", " cat", " and", " a", " ", "z", "w", "x", ...
Z_IMAGE = Family(
    pipeline=z_image_pipeline,
    plain=ZImagePipeline,
    gate=gate,
    words=((5, 6, 7), (12, 13, 14)),
    guided={"negative_prompt": "the photo", "guidance_scale": 2.0},
    unguided={"guidance_scale": 0.0},
    in_one_batch=True,
    image_tasks={False: ZImageImg2ImgPipeline, True: ZImageInpaintPipeline},
)
