"""The tokenizer: CLIP's rules, with pairs of bytes merged until every word of the world is one token.

    PYTHONPATH=assets python -m recipe.tokenizer OUT

CLIP's rules are lower case, words that end in "</w>", bytes as letters. Triggers are single tokens as well.
"""

import json
from pathlib import Path
from typing import Any

import typer
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from lora_compose.compose.support.terminal import handle_errors
from recipe.world import CHARACTERS, CLASSES, COATS, HAIR, JOBS, PAINTS, PLACES, PLAIN, STYLE_TRIGGER

MAX_LENGTH = 32
VOCABULARY = 1400
SPARE = ("zzq", "vfx", "jmt")
"""Triggers for concepts to come."""
MORE_WORDS = (
    "a", "an", "and", "with", "hair", "dressed", "as", "background", "style", "photo", "picture", "drawing", "of",
    "the", "left", "right", "small", "big", "one", "two", "three", "next", "to", "wearing", "hat",
)  # fmt: skip
# CLIP's pattern: special tokens, English endings, words, digits, other signs.
_SPLIT = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def known_words() -> list[str]:
    """All words that are one token each, in the order of the alphabet."""
    triggers = [known.trigger for known in CHARACTERS.values()]
    names = [*CLASSES, *HAIR, *JOBS, *COATS, *PAINTS, *PLAIN, *PLACES, *triggers, STYLE_TRIGGER, *SPARE, *MORE_WORDS]
    return sorted({word for name in names for word in name.split()})


def build() -> CLIPTokenizer:
    """Learns merges from the words."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()  # type: ignore[assignment]
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pre_tokenizers.Split(Regex(_SPLIT), behavior="removed", invert=True), letters]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[], initial_alphabet=alphabet, end_of_word_suffix="</w>",
        show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator([" ".join(known_words())] * 60, trainer)
    learnt = json.loads(bpe.to_str())["model"]
    vocab = dict(learnt["vocab"])
    single = [token for letter in alphabet for token in (letter, f"{letter}</w>")]
    for token in (*single, "<|startoftext|>", "<|endoftext|>"):
        vocab.setdefault(token, len(vocab))
    merges: Any = [tuple(pair) for pair in learnt["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_LENGTH)


@handle_errors()
def main(out: Path) -> None:
    """Builds the tokenizer."""
    build().save_pretrained(out)


if __name__ == "__main__":
    typer.run(main)
