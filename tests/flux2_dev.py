"""A small FLUX.2-dev pipeline of real components: those of FLUX.2-klein, with a Mistral and its processor."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Pipeline
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from tokenizers.processors import TemplateProcessing
from transformers import Mistral3Config, Mistral3ForConditionalGeneration, ProcessorMixin

from flux2 import FLUX2, LAYERS, flux2_transformer, flux2_vae
from lora_compose.pipelines.families.flux2_dev import ComposeFlux2Pipeline
from qwen import qwen_tokenizer

TEMPLATE = (
    "<s>{% for message in messages %}{% if message.role == 'system' %}[SYSTEM_PROMPT]{{ message.content[0].text }}"
    "[/SYSTEM_PROMPT]{% else %}[INST]{{ message.content[0].text }}[/INST]{% endif %}{% endfor %}"
)
MARKS = ["[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]"]


class TextProcessor(ProcessorMixin):
    """The part of Mistral's processor that reads text; its part for images needs torchvision."""

    def __init__(self, tokenizer: Any, chat_template: str | None = None) -> None:
        super().__init__(tokenizer, chat_template=chat_template)


def processor() -> Any:
    """Starts each text with a token of its own, if the template does not, and pads on the left."""
    words = qwen_tokenizer()
    words.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": MARKS})
    words.add_tokens([SYSTEM_MESSAGE])  # one token: texts stay short
    words.padding_side = "left"
    words.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", words.bos_token_id)]
    )
    return TextProcessor(words, chat_template=TEMPLATE)


def mistral3(words: int, layers: int = 3) -> Any:
    """Layers of width 24; the part for images is never run."""
    text = {
        "model_type": "mistral", "vocab_size": words, "hidden_size": 24, "intermediate_size": 32,
        "num_hidden_layers": layers, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 12,
        "max_position_embeddings": 512,
    }  # fmt: skip
    vision = {
        "model_type": "pixtral", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16, "image_size": 28, "patch_size": 14, "head_dim": 8,
    }  # fmt: skip
    return Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision)).eval()


def flux2_dev_pipeline(cls: Any = ComposeFlux2Pipeline, layers: int = 3, **changes: Any) -> Any:
    """A FLUX.2-dev pipeline of small real components, whose text encoder has so many layers."""
    torch.manual_seed(0)
    words = processor()
    pipe = cls(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=flux2_vae(),
        text_encoder=mistral3(len(words.tokenizer), layers),
        tokenizer=words,
        transformer=flux2_transformer(**{"guidance_embeds": True, **changes}),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


# 27 of padding, "<s>", "[SYSTEM_PROMPT]", the message, "[/SYSTEM_PROMPT]", "[INST]", "a", " ", "s", "k", "s", ...
FLUX2_DEV = replace(
    FLUX2,
    pipeline=flux2_dev_pipeline,
    plain=Flux2Pipeline,
    words=((34, 35, 36), (41, 42, 43)),
    guided={},
    unguided={"guidance_scale": 3.0, "text_encoder_out_layers": LAYERS},
    image_tasks={},
    by_default=partial(flux2_dev_pipeline, layers=30),
)
