"""Small Qwen tokenizers and text encoders: byte-level words with the space before them, chat templates."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLModel,
)

# As in the templates of the published tokenizers: a system part only if there is one, and an empty thought on request.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
WORDS = (
    "a cat and a dog on grass in the photo of user assistant system think Describe the image by detailing the color, "
    "shape, size, texture, quantity, text, spatial relationships of the objects and background:"
)


def qwen_tokenizer(further: str = "", ids: Mapping[str, int] | None = None) -> Any:
    """Every word above is a token, with the space before it, as most English words are to Qwen; others are letters.

    Args:
        further: More words that are tokens.
        ids: Special tokens that have numbers of their own.
    """
    split = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = split
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    words = f"{WORDS} {further}" if further else WORDS
    trained.train_from_iterator([words, *words.split()] * 2, trainer)
    bpe = json.loads(trained.to_str())["model"]
    merges: Any = [tuple(pair) for pair in bpe["merges"]]
    vocab = {"<|endoftext|>": 0} | {word: i for i, word in enumerate(bpe["vocab"], start=1)}
    found = Qwen2Tokenizer(vocab=vocab | dict(ids or {}), merges=merges, chat_template=TEMPLATE)
    found.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *(ids or ())]})
    return found


def _sizes(words: int, **changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": words, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 12, "max_position_embeddings": 512, **changes,
    }  # fmt: skip


def qwen3(words: int, layers: int = 3) -> Any:
    """FLUX.2-klein's text encoder, small."""
    return Qwen3ForCausalLM(Qwen3Config(**_sizes(words, num_hidden_layers=layers))).eval()


def qwen3_base(words: int) -> Any:
    """Z-Image's text encoder, small."""
    return Qwen3Model(Qwen3Config(**_sizes(words))).eval()


def qwen3_vl(words: int, layers: int = 3) -> Any:
    """Krea 2's text encoder, small; its part for images is never run."""
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 24,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [],
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}
    text = _sizes(words, num_hidden_layers=layers, rope_parameters=rope)
    return Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision)).eval()


def qwen2_5_vl(words: int, **tokens: Any) -> Any:
    """Qwen-Image's text encoder, small; its part for images is run by edit models alone.

    Args:
        tokens: Ids of the tokens that stand for images, by the names in its configuration.
    """
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 24,
        "fullatt_block_indexes": [0],
    }  # fmt: skip
    text = _sizes(
        words, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]},
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)).eval()


def without_zeros(model: torch.nn.Module) -> Any:
    """Norms and tables that start at zero would hide errors."""
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(False)
