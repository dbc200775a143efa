"""UNets of known models by their configuration, and LoRAs for any UNet: to measure what needs no trained files."""

import string
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from attention import Lora, LoraFactors
from pipelines.engine import LoadedConcept
from pipelines.loading import Factors
from pipelines.scene import Concept, Region

SD15: Mapping[str, Any] = {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64}
SDXL: Mapping[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {"SD 1.5": SD15, "SDXL": SDXL}

RANK = 8
# Words of one token for every CLIP tokenizer.
TRIGGERS, NOUNS = string.ascii_lowercase[:13], string.ascii_lowercase[13:]
PROMPT = " ".join(f"{trigger} {noun}" for trigger, noun in zip(TRIGGERS, NOUNS, strict=True))


def attention_lora(unet: UNet2DConditionModel) -> Lora:
    """Random factors of rank 8, on the CPU, for the projections of all attention layers; their deltas are small."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: LoraFactors(
            torch.randn(RANK, module.in_features, generator=generator) * 0.01,
            torch.randn(module.out_features, RANK, generator=generator) * 0.01,
        )
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear) and name.endswith((".to_q", ".to_k", ".to_v", ".to_out.0"))
    }


def columns(number: int, width: int, height: int) -> list[Concept]:
    """Concepts, each with a column of the picture as its region; the columns fill it."""
    boxes: list[Region] = [(width * i // number, 0, width * (i + 1) // number, height) for i in range(number)]
    return [
        Concept(name=f"concept {i}", trigger=TRIGGERS[i], class_word=NOUNS[i], weight=1.0, region=box)
        for i, box in enumerate(boxes)
    ]


def with_lora(concepts: list[Concept], lora: Lora) -> list[LoadedConcept]:
    """Concepts that all have this LoRA, as methods take them."""
    return [LoadedConcept(concept, Factors(lora)) for concept in concepts]
