"""Words are found among the tokens of a text as ComfyUI's tokenizers make them, on stand-ins of these."""

import re
from typing import Any
from zlib import crc32

import pytest
import torch

from comfy_stand_in import Clip
from lora_compose.compose.comfyui.tokens import find_tokens

EMBEDDING = "embedding:grit"


class InTemplate(Clip):
    """A tokenizer as FLUX.2-klein's: spaces and case are parts of words; a template is around the text, and padding."""

    def tokenize(self, text: str, return_word_ids: bool = False) -> Any:
        ((*tokens,),) = self.tokenize_with_weights(f"<|user\n{text}|>\n<|assistant\n")
        return {"l": [[*tokens, *[(0, 1.0, 0)] * (40 - len(tokens))]]}

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, disable_weights: bool = False) -> Any:
        tokens: list[tuple[Any, float, int]] = []
        for n, word in enumerate(re.findall(rf" ?{EMBEDDING}| ?\w+|<\||\|>|[^\w]", text), start=1):
            embedded = EMBEDDING in word
            tokens += [(torch.ones(3), 1.0, n)] * 2 if embedded else [(crc32(word.encode()), 1.0, n)]
        return [tokens]


def words_at(clip: Clip, text: str, words: str, cut: int = 0, which: Any = None) -> list[int]:
    """The positions of words behind those that are cut off."""
    ((*tokens,),) = clip.tokenize(text, return_word_ids=True).values()
    return find_tokens(clip, text, words, sum(map(len, tokens)) - cut, which)


@pytest.mark.parametrize(
    ("text", "words", "positions"),
    [
        ("a sks cat beside a dog", "cat", [5]),
        ("sks cat beside a dog, the sks cat", "sks", [3, 10]),
        ("Cat and dog, a CAT", "cat", [3, 8]),
        ("a sks  Cat", "sks cat", [4, 5, 6]),
        ("a user beside a dog", "user", [4]),
        ("user", "user", [3]),
        ("an assistant", "assistant", [4]),
        (f"a {EMBEDDING} cat", "cat", [6]),
        (f"cat, {EMBEDDING}", "cat", [3]),
    ],
)
def test_words_are_those_of_the_text_as_it_spells_them(text: str, words: str, positions: list[int]) -> None:
    assert words_at(InTemplate(), text, words) == positions
    assert words_at(InTemplate(), text, words, cut=2) == [position - 2 for position in positions]


def test_those_that_are_meant_are_chosen_by_index() -> None:
    assert words_at(InTemplate(), "cat and cat and Cat", "cat", which=(0, 2)) == [3, 7]


@pytest.mark.parametrize("clip", [Clip(), InTemplate()])
def test_words_that_are_not_in_the_text_are_asked_for(clip: Clip) -> None:
    with pytest.raises(ValueError, match="the words 'user' are not in the text; write them where"):
        words_at(clip, "a dog", "user")


def test_words_that_are_joined_to_others_are_refused() -> None:
    with pytest.raises(ValueError, match="the words 'cat' do not keep their own tokens in the text"):
        words_at(Clip(), "a cat, a dog", "cat")
