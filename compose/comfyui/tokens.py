"""Where the words of a concept are in a text, by ComfyUI's tokenizers."""

from collections.abc import Collection, Mapping, Sequence
from itertools import takewhile
from typing import Any

from torch import Tensor

from lora_compose.compose.comfyui.weights import read_weights
from lora_compose.pipelines.text.tokens import find_words

Word = tuple[int, int | None]
"""The position of a token, and its number; None for a vector of an embedding."""


def tokens_of(text: Tensor, options: Mapping[str, Any]) -> int:
    """How many tokens a conditioning has for the model; Anima's makes them of T5's, beside which the text is read."""
    ids = options.get("t5xxl_ids")
    return text.shape[1] if ids is None else ids.shape[-1]


def find_tokens(clip: Any, text: str, words: str, tokens: int, which: Collection[int] | None = None) -> list[int]:
    """The positions of words among the tokens of a text, as its conditioning has them.

    Weights in brackets are parsed, and texts are cut into parts, as ComfyUI does it.

    Args:
        clip: ComfyUI's CLIP.
        words: For example a trigger.
        tokens: How many tokens the conditioning has; those of a chat template may be cut off in front of it.
        which: Indices of the occurrences that are meant; None is all.

    Raises:
        ValueError: If the words are not in the text, or are joined to other signs there.
    """
    encoder, every = _tokens(clip, text)
    _, empty = _tokens(clip, "")
    outer, read, template = clip.tokenizer, _of_words(every), _of_words(empty)
    inner = next(getattr(outer, name) for name in (encoder, f"clip_{encoder}") if hasattr(outer, name))
    # An empty text has the words of a chat template alone, which are none of the text.
    front = _shared(read, template)
    back = min(_shared(read[::-1], template[::-1]), len(template) - front)
    cut = max(0, len(every) - tokens)
    read = [(place - cut, number) for place, number in read[front : len(read) - back] if place >= cut]
    numbers, plain = tuple(number for _, number in read), read_weights(text).text
    spans = find_words(words, plain)
    # As the text spells them, since not all tokenizers ignore case; to some, the space before a word is a part of it.
    spelled = {f"{space}{plain[slice(*span)]}" for span in spans for space in ("", " ")}
    forms = sorted({_plain(inner, said) for said in spelled} - {()}, key=len)
    starts = {
        i: range(i, i + len(form)) for i in range(len(read)) for form in forms if numbers[i : i + len(form)] == form
    }
    if not spans:
        raise ValueError(f"the words {words!r} are not in the text; write them where the concept is meant")
    if len(starts) != len(spans):
        raise ValueError(f"the words {words!r} do not keep their own tokens in the text; put spaces around them")
    return [read[k][0] for n, places in enumerate(starts.values()) if which is None or n in which for k in places]


def _tokens(clip: Any, text: str) -> tuple[str, list[tuple[Any, float, int]]]:
    """The tokens of a text, each with its weight and the number of its word, and the encoder that they are for."""
    by_encoder = clip.tokenize(text, return_word_ids=True)
    encoder = "t5xxl" if "t5xxl" in by_encoder else next(iter(by_encoder))  # of FLUX.1, T5 alone makes the tokens
    return encoder, [token for part in by_encoder[encoder] for token in part]


def _of_words(tokens: Sequence[tuple[Any, float, int]]) -> list[Word]:
    """The tokens of words, without special ones and padding."""
    return [(place, token if isinstance(token, int) else None) for place, (token, _, word) in enumerate(tokens) if word]


def _shared(first: Sequence[Word], second: Sequence[Word]) -> int:
    """How many tokens both begin with."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0][1] == pair[1][1], pairs))


def _plain(tokenizer: Any, words: str) -> tuple[int, ...]:
    parts = tokenizer.tokenize_with_weights(words, return_word_ids=True, disable_weights=True)
    return tuple(token for part in parts for token, _, word in part if word)
