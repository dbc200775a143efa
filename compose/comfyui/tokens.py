"""Where the words of a concept are in a text, by ComfyUI's tokenizers."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from lora_compose.compose.comfyui.weights import read_weights
from lora_compose.pipelines.text.tokens import find_words


def tokens_of(text: Tensor, options: Mapping[str, Any]) -> int:
    """How many tokens a conditioning has for the model; Anima's makes them of T5's, beside which the text is read."""
    ids = options.get("t5xxl_ids")
    return text.shape[1] if ids is None else ids.shape[-1]


def find_tokens(clip: Any, text: str, words: str, tokens: int, which: Collection[int] | None = None) -> list[int]:
    """The positions of words among the tokens of a text, as its conditioning has them.

    Weights in brackets are parsed, and texts are cut into parts, as ComfyUI does it.

    Args:
        clip: ComfyUI's CLIP.
        text: The text.
        words: For example a trigger.
        tokens: How many tokens the conditioning has; those of a chat template may be cut off in front of it.
        which: Indices of the occurrences that are meant; None is all.

    Raises:
        ValueError: If the words are not in the text, or are joined to other signs there.
    """
    by_encoder = clip.tokenize(text, return_word_ids=True)
    encoder = "t5xxl" if "t5xxl" in by_encoder else next(iter(by_encoder))  # of FLUX.1, T5 alone makes the tokens
    outer = clip.tokenizer
    inner = next(getattr(outer, name) for name in (encoder, f"clip_{encoder}") if hasattr(outer, name))
    every = [token for part in by_encoder[encoder] for token in part][-tokens:]
    read = [(position, token) for position, (token, _, word) in enumerate(every) if word]
    times = len(find_words(words, read_weights(text).text))
    for given in (words, f" {words}"):  # to some tokenizers the space before a word is a part of it
        wanted = _plain(inner, given)
        starts = [
            i for i in range(len(read) - len(wanted) + 1) if [token for _, token in read[i : i + len(wanted)]] == wanted
        ]
        if times and len(starts) == times:
            meant = [start for n, start in enumerate(starts) if which is None or n in which]
            return [read[i + k][0] for i in meant for k in range(len(wanted))]
    if not times:
        raise ValueError(f"the words {words!r} are not in the text; write them where the concept is meant")
    raise ValueError(f"the words {words!r} do not keep their own tokens in the text; put spaces around them")


def _plain(tokenizer: Any, words: str) -> list[Any]:
    parts = tokenizer.tokenize_with_weights(words, return_word_ids=True, disable_weights=True)
    return [token for part in parts for token, _, word in part if word]
