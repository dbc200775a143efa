"""Where trigger and class word stand in captions, and the text features there."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_compose.compose.training.data import DataError
from lora_compose.pipelines.scene.scene import Concept
from lora_compose.pipelines.text.templates import TemplateTokenizer
from lora_compose.pipelines.text.tokens import (
    Mention,
    Tokenizer,
    class_words,
    find_trigger,
    free_nouns,
    locate_mention,
    past,
    span_positions,
)


@dataclass(frozen=True)
class Occurrence:
    """A mention of the concept: token positions of the trigger, and of the class word that belongs to it.

    Those of the class word are in the caption that class features come from; empty if there is none.
    """

    trigger: tuple[int, ...]
    noun: tuple[int, ...] = ()


@dataclass(frozen=True)
class CaptionWords:
    """A caption, the text of its class features (itself, or without the trigger), and its mentions."""

    caption: str
    class_caption: str
    occurrences: tuple[Occurrence, ...]

    @property
    def trigger(self) -> tuple[int, ...]:
        """Token positions of all triggers."""
        return tuple(position for occurrence in self.occurrences for position in occurrence.trigger)


def find_concept(
    tokenizers: Sequence[Tokenizer], caption: str, concept: Concept, *, noun: bool, clean: bool
) -> CaptionWords:
    """Finds the concept's words in a caption, by tokenizers that must agree about the positions (SDXL has two).

    `noun` is whether the class word is needed, `clean` whether class features come from the caption without the
    trigger.

    Raises:
        DataError: If a word is missing, stands past the model's limit, is no word to a tokenizer, or the tokenizers
            differ.
    """
    by_tokenizer = [_find(tokenizer, caption, concept, noun, clean) for tokenizer in tokenizers]
    if any(other != by_tokenizer[0] for other in by_tokenizer):
        raise DataError(f"the model's two tokenizers read {caption!r} differently; choose a trigger of plain letters")
    return by_tokenizer[0]


def _find(tokenizer: Tokenizer, caption: str, concept: Concept, needed: bool, clean: bool) -> CaptionWords:
    caption = unicodedata.normalize("NFC", caption)
    pairs = class_words(concept, caption, [concept])
    if not pairs:
        raise DataError(
            f"the caption {caption!r} lacks the trigger {concept.trigger!r}; write {concept.phrase!r} in it"
        )
    without = _without_trigger(caption, concept) if clean else caption
    nouns = free_nouns(concept, caption, [concept])
    occurrences = []
    for span, noun in pairs:
        if needed and noun is None:
            raise DataError(
                f"the caption {caption!r} lacks the class word {concept.class_word!r} after the trigger; the alignment "
                f"needs it: write {concept.phrase!r}"
            )
        try:
            trigger = tuple(span_positions(tokenizer, caption, span, concept))
            mention = None if noun is None else Mention((), which=(nouns.index(noun),))
            at = locate_mention(tokenizer, without, concept, mention, [concept]) if mention and needed else ()
        except ValueError as error:
            raise DataError(str(error)) from error
        _check_known(tokenizer, caption, trigger, concept)
        occurrences.append(Occurrence(trigger, at))
    return CaptionWords(caption, without, tuple(occurrences))


def _without_trigger(caption: str, concept: Concept) -> str:
    for start, end in reversed(find_trigger(concept, caption)):
        caption = caption[:start] + caption[past(caption, end) :].lstrip()
    return caption


def class_caption(caption: str, concept: Concept) -> str:
    """A caption about the class: without the trigger where a class word follows it, with the class word otherwise."""
    caption = unicodedata.normalize("NFC", caption)
    for (start, end), noun in reversed(class_words(concept, caption, [concept])):
        rest = caption[past(caption, end) :]
        caption = caption[:start] + (rest.lstrip() if noun else f"{concept.class_word}{rest}")
    return caption


def _check_known(tokenizer: Any, caption: str, positions: Sequence[int], concept: Concept) -> None:
    if isinstance(tokenizer, TemplateTokenizer):
        return  # those of language models know every byte
    ids = tokenizer(caption, truncation=True, verbose=False).input_ids
    if any(ids[position] in tokenizer.all_special_ids for position in positions):
        raise DataError(
            f"the trigger {concept.trigger!r} is no token to this model's tokenizer, which has no such letters; choose "
            "another one"
        )


def check_class_caption(caption: str, concept: Concept) -> None:
    """Checks that a class image's caption does not name the concept.

    Raises:
        DataError: If it does.
    """
    if find_trigger(concept, caption):
        raise DataError(
            f"the caption {caption!r} of a class image has the trigger {concept.trigger!r}; class images show what "
            "the concept is not"
        )


@dataclass(frozen=True)
class WordFeatures:
    """Text features at the trigger and at its class word in all captions, a row for every token of a trigger.

    Shapes: [rows, channels], fp32; `of_caption` has the rows of each caption.
    """

    trigger: Tensor
    noun: Tensor
    of_caption: tuple[tuple[int, ...], ...]

    @property
    def ranks(self) -> int:
        """How many ranks set all keys of one trigger."""
        return max(map(len, self.of_caption), default=0)

    def weights(self, captions: Sequence[int]) -> Tensor:
        """How much each row counts: captions count alike, and within a caption its rows do. Shape: [rows], sum 1."""
        weights = torch.zeros(len(self.trigger))
        for caption in captions:
            rows = self.of_caption[caption]
            weights[list(rows)] += 1 / (len(captions) * len(rows))
        return weights


def rows_of(words: Sequence[CaptionWords], text: Tensor, class_text: Tensor) -> WordFeatures:
    """The features that alignment compares, from those of the captions and of their `class_caption`.

    A trigger and a class word of as many tokens are paired one by one; otherwise every token of the trigger belongs to
    the mean of the class word's tokens. Shapes: [captions, tokens, channels].
    """
    trigger, noun, of_caption = [], [], []
    for features, class_features, caption in zip(text.float(), class_text.float(), words, strict=True):
        first = len(trigger)
        for occurrence in caption.occurrences:
            nouns = class_features[list(occurrence.noun)]
            if len(occurrence.noun) != len(occurrence.trigger):
                nouns = nouns.mean(0, keepdim=True).expand(len(occurrence.trigger), -1)
            trigger += features[list(occurrence.trigger)].unbind()
            noun += nouns.unbind()
        of_caption.append(tuple(range(first, len(trigger))))
    return WordFeatures(torch.stack(trigger), torch.stack(noun), tuple(of_caption))
