"""A small Chroma pipeline of real components."""

from typing import Any

import torch
from diffusers import (
    ChromaImg2ImgPipeline,
    ChromaInpaintPipeline,
    ChromaPipeline,
    ChromaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor
from transformers import T5Config, T5EncoderModel

import flux
from components import small_vae
from lora_compose.pipelines.families.chroma import ComposeChromaPipeline
from made_once import made_once
from transformer_families import Family, Places


def chroma_transformer(**changes: Any) -> ChromaTransformer2DModel:
    """Two double-stream and two single-stream blocks of width 32, all of whose numbers are random."""
    config: dict[str, Any] = {
        "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 24, "axes_dims_rope": (4, 6, 6), "approximator_num_channels": 16,
        "approximator_hidden_dim": 32, "approximator_layers": 1,
    }  # fmt: skip
    transformer = ChromaTransformer2DModel(**config | changes)
    transformer.register_to_config(guidance_embeds=False)  # without which diffusers does not inpaint
    return transformer.eval().requires_grad_(False)


@made_once
def chroma_pipeline(cls: Any = ComposeChromaPipeline, **changes: Any) -> Any:
    """A Chroma pipeline of small real components."""
    torch.manual_seed(0)
    words = flux.t5_tokenizer()
    t5 = T5Config(vocab_size=len(words), d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3, dropout_rate=0.0)
    pipe = cls(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=small_vae(shift_factor=0.1),
        text_encoder=T5EncoderModel(t5).eval(),
        tokenizer=words,
        transformer=chroma_transformer(**changes),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def gate(name: str, x: Tensor, places: Places) -> Tensor:
    """Where a LoRA acts in a layer of Chroma; most have the names of FLUX.1's."""
    if name.startswith("distilled_guidance_layer"):
        return places.modulation[:, None]
    return flux.gate(name, x, places)


CHROMA = Family(
    pipeline=chroma_pipeline,
    plain=ChromaPipeline,
    gate=gate,
    words=flux.FLUX.words,
    guided={"negative_prompt": "the photo", "guidance_scale": 3.0},
    unguided={"guidance_scale": 1.0},
    image_tasks={False: ChromaImg2ImgPipeline, True: ChromaInpaintPipeline},
)
