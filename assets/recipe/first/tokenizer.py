"""The playground's tokenizer: CLIP's rules, with pairs of bytes merged until every word of its world is one token.

    python -m recipe.first.tokenizer sprites.npz OUT

CLIP's rules are lower case, words that end in "</w>", bytes as letters. Triggers are single tokens as well.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from lora_compose.compose.support.terminal import handle_errors
from recipe.first.scenes import scene
from recipe.first.world import CONCEPTS, HUES, PLAIN, STYLE_TRIGGER, Sprites

MAX_LENGTH = 32
VOCABULARY = 1400
SPARE = ("zzq",)  # triggers for concepts to come
MORE_WORDS = [
    "photo",
    "of",
    "the",
    "with",
    "left",
    "right",
    "small",
    "big",
    "one",
    "two",
    "three",
    "picture",
    "drawing",
    "emoji",
    "style",
    "in",
]
# CLIP's pattern: special tokens, English endings, words, digits, other signs.
_SPLIT = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def build(captions: Sequence[str]) -> CLIPTokenizer:
    """Learns merges from captions and from words that have to be one token."""
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
    bpe.train_from_iterator([*captions, *insisted()], trainer)
    learnt = json.loads(bpe.to_str())["model"]
    vocab = dict(learnt["vocab"])
    single = [token for letter in alphabet for token in (letter, f"{letter}</w>")]
    for token in (*single, "<|startoftext|>", "<|endoftext|>"):
        vocab.setdefault(token, len(vocab))
    merges: Any = [tuple(pair) for pair in learnt["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_LENGTH)


def insisted() -> list[str]:
    """Words that must be one token each, often enough to be merged."""
    triggers = [known.trigger for known in CONCEPTS.values()]
    words = [*MORE_WORDS, *HUES, *PLAIN, *triggers, STYLE_TRIGGER, *SPARE]
    return [" ".join(words)] * 60


def captions(sprites: Sprites, number: int, seed: int = 5) -> list[str]:
    """Captions of the world's images."""
    rng = np.random.default_rng(seed)
    return [scene(rng, sprites).caption for _ in range(number)]


@handle_errors()
def main(
    sprites: Path, out: Path, number: Annotated[int, typer.Option("--captions", min=1, help="To learn from.")] = 4000
) -> None:
    """Builds the tokenizer."""
    build(captions(dict(np.load(sprites)), number)).save_pretrained(out)


if __name__ == "__main__":
    typer.run(main)
