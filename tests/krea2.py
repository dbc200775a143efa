"""A small Krea 2 pipeline of real components."""

from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, Krea2Pipeline, Krea2Transformer2DModel
from torch import Tensor

from lora_compose.pipelines.families.krea2 import ComposeKrea2Pipeline
from made_once import made_once
from qwen import qwen3_vl, qwen_tokenizer, without_zeros
from transformer_families import Family, Places


def krea2_transformer(**changes: Any) -> Krea2Transformer2DModel:
    """Three blocks of width 32, grouped-query attention, three layers of text."""
    config: dict[str, Any] = {
        "in_channels": 16, "num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2,
        "num_key_value_heads": 1, "intermediate_size": 48, "timestep_embed_dim": 32, "text_hidden_dim": 24,
        "num_text_layers": 3, "text_num_attention_heads": 2, "text_num_key_value_heads": 2,
        "text_intermediate_size": 32, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1,
        "axes_dims_rope": (4, 6, 6),
    }  # fmt: skip
    return without_zeros(Krea2Transformer2DModel(**config | changes))


@made_once
def krea2_pipeline(cls: Any = ComposeKrea2Pipeline, **changes: Any) -> Any:
    """A Krea 2 pipeline of small real components."""
    torch.manual_seed(0)
    words = qwen_tokenizer()
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 2.0, 1.0, 0.5],
    )  # fmt: skip
    pipe = cls(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=6400
        ),
        vae=vae.eval(),
        text_encoder=qwen3_vl(len(words)),
        tokenizer=words,
        transformer=krea2_transformer(**changes),
        text_encoder_select_layers=(0, 1, 3),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def gate(name: str, x: Tensor, places: Places) -> Tensor:
    """Where a LoRA acts in a layer of Krea 2."""
    if name.startswith("time"):
        return places.modulation[:, None]
    if "layerwise" in name:
        return places.text.flatten(0, 1)[:, None]
    if name == "text_fusion.projector":
        return places.text[:, :, None]
    if name.startswith("tex") or name.startswith("txt"):
        return places.text
    return torch.cat([places.text, places.image], dim=1) if name.startswith("transformer_blocks") else places.image


# After the 34 tokens of the template: "a", " ", "s", "k", "s", " cat", " and", " a", " ", "z", "w", "x", " dog", ...
KREA2 = Family(
    pipeline=krea2_pipeline,
    plain=Krea2Pipeline,
    gate=gate,
    words=((2, 3, 4), (9, 10, 11)),
    guided={"negative_prompt": "the photo", "guidance_scale": 2.0},
    unguided={"guidance_scale": 0.0},
)
