"""The text side of the playground's transformer: a T5 of two layers whose every word is one token.

The words are those of the playground's CLIP tokenizer, and their vectors begin as CLIP's, which have learnt from images
what a cat and a fox have in common; triggers that no picture names stay as they are there.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from recipe.first.world import BASE_CLASSES, PATTERNS, PLACES

MAX_TOKENS = 24
WIDTH = 192
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.'-"
ENDING = "</w>"  # of words in CLIP's vocabulary


def known_words(clip: CLIPTokenizer, more: Sequence[str]) -> list[str]:
    """Words of captions and more of them that are one token for CLIP too, in the order of the alphabet."""
    known = [*BASE_CLASSES, *PLACES, *PATTERNS.values(), "a picture of an background and", *more]
    words = {word for text in known for word in text.split()}
    vocabulary = clip.get_vocab()
    return sorted(word for word in words if word + ENDING in vocabulary)


def new_tokenizer(words: Sequence[str]) -> T5Tokenizer:
    """One token per word, with the space before it, and letters for what is none of them."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    spaced = [(f"▁{word}", -2.0) for word in words]
    letters = [(letter, -8.0) for letter in LETTERS]
    return T5Tokenizer(vocab=[*special, *spaced, ("▁", -6.0), *letters], extra_ids=0, model_max_length=MAX_TOKENS)


def new_encoder(tokenizer: T5Tokenizer, clip: CLIPTextModel, words: CLIPTokenizer) -> T5EncoderModel:
    """An untrained encoder that has CLIP's vectors of the words it knows, at T5's size."""
    config = T5Config(
        vocab_size=len(tokenizer), d_model=WIDTH, d_kv=48, d_ff=512, num_layers=2, num_heads=4, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    model: Any = T5EncoderModel(config)
    source: Any = clip
    known = source.get_input_embeddings().weight.detach().float()
    known = known / known.pow(2).mean(1, keepdim=True).sqrt()
    vocabulary = words.get_vocab()
    table = model.get_input_embeddings().weight
    with torch.no_grad():
        for piece, index in tokenizer.get_vocab().items():
            same = vocabulary.get(piece.removeprefix("▁") + ENDING)
            if same is not None:
                table[index] = known[same]
    return model
