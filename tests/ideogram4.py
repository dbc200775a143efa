"""A small Ideogram 4 pipeline of real components, with two networks of different weights."""

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Ideogram4Pipeline, Ideogram4Transformer2DModel
from diffusers.pipelines.ideogram4 import pipeline_ideogram4
from torch import Tensor

from flux2 import flux2_vae
from lora_compose.pipelines.families.ideogram4 import ComposeIdeogram4Pipeline
from made_once import made_once
from qwen import TEMPLATE, qwen3_vl, qwen_tokenizer, without_zeros
from transformer_families import TOKENS, Family, Places

LAYERS = (0, 2)
"""Layers of the small text encoder, in place of the 13 of the published one."""


def ideogram4_transformer(**changes: Any) -> Ideogram4Transformer2DModel:
    """Three layers of width 32."""
    config: dict[str, Any] = {
        "in_channels": 16, "num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2, "intermediate_size": 48,
        "adaln_dim": 8, "llm_features_dim": 24 * len(LAYERS), "mrope_section": (4, 2, 2),
    }  # fmt: skip
    return without_zeros(Ideogram4Transformer2DModel(**config | changes))


@made_once
def ideogram4_pipeline(cls: Any = ComposeIdeogram4Pipeline, **changes: Any) -> Any:
    """An Ideogram 4 pipeline of small real components."""
    pipeline_ideogram4.QWEN3_VL_ACTIVATION_LAYERS = LAYERS
    torch.manual_seed(0)
    words = qwen_tokenizer()
    words.chat_template = TEMPLATE.replace("message.content", "message.content[0].text")
    pipe = cls(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=flux2_vae(),
        text_encoder=qwen3_vl(len(words)),
        tokenizer=words,
        transformer=ideogram4_transformer(**changes),
        unconditional_transformer=ideogram4_transformer(**changes),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


PADDING = TOKENS - 23
"""Padding tokens of the tests' prompt; diffusers puts them before the text."""


def gate(name: str, x: Tensor, places: Places) -> Tensor:
    """Where a LoRA acts in a layer of Ideogram 4."""
    if name.startswith("t_embedding"):
        return places.modulation
    if "adaln" in name:
        return places.modulation[:, None]
    as_diffusers = places.text.shape[1] == TOKENS  # further texts stand behind the first
    text = places.text.roll(PADDING, 1) if as_diffusers else places.text
    return torch.cat([text, places.image], dim=1)


# After "<|im_start|>", "user" and a line break, as in FLUX.2.
IDEOGRAM4 = Family(
    pipeline=ideogram4_pipeline,
    plain=Ideogram4Pipeline,
    gate=gate,
    words=((5, 6, 7), (12, 13, 14)),
    guided={"guidance_scale": 3.0, "guidance_schedule": None},
    unguided={"guidance_scale": 1.0, "guidance_schedule": None},
    two_networks=True,
    padding_first=PADDING,
)
