"""A small FLUX pipeline of real components."""

from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from torch import Tensor
from transformers import CLIPTextModel, T5Config, T5EncoderModel, T5Tokenizer

from components import small_vae, text_config, tokenizer
from lora_compose.pipelines.families.flux import ComposeFluxPipeline
from made_once import made_once
from transformer_families import TOKENS, Family, Places


def flux_transformer(**changes: Any) -> FluxTransformer2DModel:
    """Two double-stream and two single-stream blocks of width 32, all of whose numbers are random."""
    config: dict[str, Any] = {
        "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 24, "pooled_projection_dim": 24, "guidance_embeds": True, "axes_dims_rope": (4, 6, 6),
    }  # fmt: skip
    return FluxTransformer2DModel(**config | changes).eval().requires_grad_(False)


def t5_tokenizer() -> T5Tokenizer:
    """Words and letters, without a start token, and with the space before a word in its token, as T5's."""
    words = ["a", "cat", "and", "dog", "on", "grass", "in", "the", "photo", "of"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -2.0) for word in words), ("▁", -3.0)]
    letters = [(letter, -4.0) for letter in "abcdefghijklmnopqrstuvwxyz,."]
    return T5Tokenizer(vocab=[*pieces, *letters], extra_ids=0, model_max_length=TOKENS)


@made_once
def flux_pipeline(cls: Any = ComposeFluxPipeline, **changes: Any) -> Any:
    """A FLUX pipeline of small real components."""
    torch.manual_seed(0)
    words, more_words = tokenizer(), t5_tokenizer()
    t5 = T5Config(vocab_size=len(more_words), d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3, dropout_rate=0.0)
    pipe = cls(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=small_vae(shift_factor=0.1),
        text_encoder=CLIPTextModel(text_config(words)).eval(),
        tokenizer=words,
        text_encoder_2=T5EncoderModel(t5).eval(),
        tokenizer_2=more_words,
        transformer=flux_transformer(**changes),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def gate(name: str, x: Tensor, places: Places) -> Tensor:
    """Where a LoRA acts in a layer of FLUX."""
    if ".norm" in name or name.startswith(("norm_out", "time_text_embed")):
        return places.modulation
    if name.startswith("single"):
        return torch.cat([places.text, places.image], dim=1)
    text = ("context_embedder", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff_context")
    return places.text if any(part in name for part in text) else places.image


# "a", a space, "s", "k", "s", " cat", " and", " a", a space, "z", "w", "x": a space belongs to the word after it.
FLUX = Family(
    pipeline=flux_pipeline,
    plain=FluxPipeline,
    gate=gate,
    words=((1, 2, 3, 4), (8, 9, 10, 11)),
    guided={"negative_prompt": "the photo", "true_cfg_scale": 3.0},
    image_tasks={False: FluxImg2ImgPipeline, True: FluxInpaintPipeline},
)
