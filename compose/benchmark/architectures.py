"""Models from configurations, and random LoRAs for any UNet: benchmarks need no trained files."""

import string
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    ChromaTransformer2DModel,
    CosmosTransformer3DModel,
    Flux2Transformer2DModel,
    Flux3Transformer2DModel,
    FluxTransformer2DModel,
    Ideogram4Transformer2DModel,
    Krea2Transformer2DModel,
    QwenImageTransformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from diffusers.models import AnimaTextConditioner
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from lora_compose.attention import Lora, LoraFactors
from lora_compose.pipelines.concepts.concept_set import LoadedConcept
from lora_compose.pipelines.concepts.loading import Factors
from lora_compose.pipelines.methods import Settings
from lora_compose.pipelines.scene.scene import Concept, Region

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
SD2: Mapping[str, Any] = {
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "sample_size": 96,
    "use_linear_projection": True,
}
VAE: Mapping[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
"""The VAE of all UNets, but for the size of the images that it was trained on."""
ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {"SD 1.5": SD15, "SDXL": SDXL}

CLIP_L: Mapping[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
}  # fmt: skip
_OPEN_CLIP_H: Mapping[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
}  # fmt: skip
_OPEN_CLIP_G: Mapping[str, Any] = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "projection_dim": 1280,
}  # fmt: skip
_FAMILIES: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any] | None]] = {
    "SD 1.x": (SD15, CLIP_L, None),
    "SD 2.x": (SD2, _OPEN_CLIP_H, None),
    "SDXL": (SDXL, CLIP_L, _OPEN_CLIP_G),
}
QWEN3: Mapping[str, Any] = {
    "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
}  # fmt: skip
"""Qwen3-0.6B, Anima's text encoder."""
QWEN3_4B: Mapping[str, Any] = dict(QWEN3) | {
    "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
}  # fmt: skip
"""The text encoder of Z-Image and FLUX.2-klein 4B."""
_QWEN3_8B: Mapping[str, Any] = dict(QWEN3_4B) | {"hidden_size": 4096, "intermediate_size": 12288}
"""The text encoder of FLUX.2-klein 9B."""
_QWEN2_5_VL: Mapping[str, Any] = {
    "text_config": {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4,
    },
    "vision_config": {"hidden_size": 1280, "out_hidden_size": 3584},
}  # fmt: skip
"""Qwen2.5-VL 7B, the text encoder of Qwen-Image."""
T5_XXL: Mapping[str, Any] = {
    "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu",
}  # fmt: skip
"""T5 v1.1 XXL, the second text encoder of FLUX.1, and Chroma's."""
TRANSFORMERS: Mapping[str, tuple[Callable[..., nn.Module], Mapping[str, Any]]] = {
    "Anima": (CosmosTransformer3DModel, {"num_attention_heads": 16, "extra_pos_embed_type": None}),
    "Chroma": (ChromaTransformer2DModel, {}),
    "FLUX.1": (FluxTransformer2DModel, {"guidance_embeds": True}),
    "FLUX.2-dev": (Flux2Transformer2DModel, {}),
    "FLUX.2-klein 4B": (
        Flux2Transformer2DModel,
        {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680,
         "guidance_embeds": False},
    ),
    "FLUX.2-klein 9B": (
        Flux2Transformer2DModel,
        {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288,
         "guidance_embeds": False},
    ),
    "FLUX.3": (Flux3Transformer2DModel, {}),
    "Ideogram 4": (Ideogram4Transformer2DModel, {}),
    "Krea 2": (Krea2Transformer2DModel, {}),
    "Qwen-Image": (QwenImageTransformer2DModel, {}),
    "Z-Image": (ZImageTransformer2DModel, {}),
}  # fmt: skip
"""Configurations of transformers: the defaults of their classes, with changes.

The defaults are those of `transformer/config.json` of FLUX.1-dev, Krea-2-Turbo, Qwen-Image and Z-Image-Turbo (whose
`axes_lens` of 1536 is the length of a table); those of Chroma, FLUX.3 and Ideogram 4 are what diffusers has for them.
FLUX.2: `Flux2Params`, `Klein4BParams` and `Klein9BParams` in `src/flux2/model.py` of
github.com/black-forest-labs/flux2. Anima: the 2B model of Cosmos Predict2, as diffusers' converter
`scripts/convert_cosmos_to_diffusers.py` has it.
"""
FAMILIES = (*_FAMILIES, *TRANSFORMERS)
_TEXT_MODELS: Mapping[str, Callable[[], Mapping[str, nn.Module]]] = {
    "Anima": lambda: {"text_encoder": Qwen3Model(Qwen3Config(**QWEN3)), "text_conditioner": AnimaTextConditioner()},
    "Chroma": lambda: {"text_encoder": T5EncoderModel(T5Config(**T5_XXL))},
    "FLUX.1": lambda: {
        "text_encoder": CLIPTextModel(CLIPTextConfig(**CLIP_L)),
        "text_encoder_2": T5EncoderModel(T5Config(**T5_XXL)),
    },
    "FLUX.2-klein 4B": lambda: {"text_encoder": Qwen3Model(Qwen3Config(**QWEN3_4B))},
    "FLUX.2-klein 9B": lambda: {"text_encoder": Qwen3Model(Qwen3Config(**_QWEN3_8B))},
    "Qwen-Image": lambda: {"text_encoder": Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**_QWEN2_5_VL))},
    "Z-Image": lambda: {"text_encoder": Qwen3Model(Qwen3Config(**QWEN3_4B))},
}
"""The models of transformers' texts, for families whose LoRA files may change them.

Sources: `text_encoder/config.json` and `text_encoder_2/config.json` of FLUX.1-dev (T5 v1.1 XXL) and Z-Image-Turbo
(Qwen3-4B).
"""

RANK = 8
# Words of one token for every CLIP tokenizer.
TRIGGERS, NOUNS = string.ascii_lowercase[:13], string.ascii_lowercase[13:]
PROMPT = " ".join(f"{trigger} {noun}" for trigger, noun in zip(TRIGGERS, NOUNS, strict=True))


@cache
def without_weights(family: str) -> SimpleNamespace:
    """The models of one of `FAMILIES` at full size, on the meta device: names and shapes, but no values."""
    if family in TRANSFORMERS:
        build, config = TRANSFORMERS[family]
        with torch.device("meta"):
            parts = SimpleNamespace(transformer=build(**config), **_TEXT_MODELS.get(family, dict)())
            if family == "Ideogram 4":
                parts.transformer.rotary_emb.forward = partial(_rotations, parts.transformer.rotary_emb.head_dim)
            return parts
    unet, text, second = _FAMILIES[family]
    with torch.device("meta"):
        parts = SimpleNamespace(unet=UNet2DConditionModel(**unet), text_encoder=CLIPTextModel(CLIPTextConfig(**text)))
        if second is not None:
            parts.text_encoder_2 = CLIPTextModelWithProjection(CLIPTextConfig(**second))
    return parts


def _rotations(channels: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The shapes of Ideogram 4's rotary embedding, which switches autocast off: torch has none on the meta device."""
    rotated = torch.empty(*positions.shape[:2], channels, device=positions.device)
    return rotated, rotated


def attention_lora(unet: UNet2DConditionModel, rank: int = RANK, seed: int = 0) -> Lora:
    """Random factors, on the CPU, for the projections of all attention layers; their deltas are small."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: LoraFactors(
            torch.randn(rank, module.in_features, generator=generator) * 0.01,
            torch.randn(module.out_features, rank, generator=generator) * 0.01,
        )
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear) and name.endswith((".to_q", ".to_k", ".to_v", ".to_out.0"))
    }


def columns(number: int, width: int, height: int) -> list[Concept]:
    """Concepts, each with a column of the image as its region; the columns fill it."""
    boxes: list[Region] = [(width * i // number, 0, width * (i + 1) // number, height) for i in range(number)]
    return [
        Concept(name=f"concept {i}", trigger=TRIGGERS[i], class_word=NOUNS[i], weight=1.0, region=box)
        for i, box in enumerate(boxes)
    ]


def without_boxes(concepts: Iterable[Concept]) -> list[Concept]:
    """Concepts that may be anywhere."""
    return [concept.model_copy(update={"region": None}) for concept in concepts]


def as_called(pipe: Any, settings: Settings, number: int, width: int, height: int) -> list[Concept]:
    """Concepts of `columns`, which the pipeline has loaded; with boxes only where a method refuses to go without."""
    boxed = columns(number, width, height)
    free = without_boxes(boxed)
    try:
        pipe.plan(prompt=PROMPT, concepts=free, method=settings, width=width, height=height)
    except ValueError:
        return boxed
    return free


def with_lora(concepts: list[Concept], lora: Lora) -> list[LoadedConcept]:
    """Concepts that all have this LoRA, as methods take them."""
    return [LoadedConcept(concept, Factors(lora)) for concept in concepts]
