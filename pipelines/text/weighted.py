"""Texts with weights through compel, which blends each word with a text that lacks it (damian0815/compel, MIT)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_compose.pipelines.support.spelling import shortened
from lora_compose.pipelines.text.emphasis import Weighted


def weighted_embeds(
    tokenizer: Any,
    text_encoder: Any,
    emphasis: Weighted,
    device: torch.device,
    *,
    penultimate: bool,
    expand: Callable[[str, Any], str],
    length: int | None = None,
) -> Tensor:
    """Encodes one chunk of a text with weights.

    Args:
        text_encoder: Its text encoder, in whatever state it is.
        penultimate: Whether the model reads the layer before the last, without its norm, as SDXL does.
        expand: Writes words of several vectors as all their tokens.
        length: Tokens to which the text is padded or cut; None is what the tokenizer says.

    Returns:
        Shape: [1, tokens, channels].

    Raises:
        ValueError: If the parts with one weight each have other tokens than the text as a whole.
    """
    from compel.embeddings_provider import EmbeddingsProvider, ReturnedEmbeddingsType

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids

    fragments, weights = emphasis.fragments()
    fragments = [expand(text, tokenizer) for text in fragments]
    if [token for text in fragments for token in ids(text)] != ids(expand(emphasis.text, tokenizer)):
        raise ValueError(
            f"a weight ends inside a word of {shortened(emphasis.text)}; put spaces around the parentheses"
        )
    layers = ReturnedEmbeddingsType
    provider = EmbeddingsProvider(
        tokenizer,
        text_encoder,
        dtype_for_device_getter=lambda _: text_encoder.dtype,
        padding_attention_mask_value=0 if getattr(text_encoder.config, "use_attention_mask", False) else 1,
        returned_embeddings_type=(
            layers.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED if penultimate else layers.LAST_HIDDEN_STATES_NORMALIZED
        ),
        model_max_length=length,
        device=device,  # pyright: ignore[reportArgumentType]
    )
    embeds: Any = provider.get_embeddings_for_weighted_prompt_fragments([fragments], [weights], device=device)  # pyright: ignore[reportArgumentType]
    return embeds
