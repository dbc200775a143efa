"""From the words of a prompt to token positions, per tokenizer.

TARA (arXiv 2508.08812) masks LoRA deltas by the positions of each concept's trigger, so a wrong position silently ruins
the image. Words are found as whole words in the text, and every position is checked against the token ids.
"""

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch import Tensor

from lora_compose.pipelines.scene.scene import Concept
from lora_compose.pipelines.support.spelling import shortened
from lora_compose.pipelines.support.words import ending, parts_of, spaced, unescaped
from lora_compose.pipelines.text.long_prompts import LongTokenizer, Span
from lora_compose.pipelines.text.templates import TemplateTokenizer

_BRACKET = re.compile(r"\\[()\[\]]")  # in a pattern of `re.escape`
_EDGES = "()[]\\"
_LETTERS = re.compile(r"[^\W_]+")


class Tokenizer(Protocol):
    """The required interface of a tokenizer; it must tokenise word by word, as CLIP's does, fast or slow."""

    @property
    def model_max_length(self) -> int:
        """How many tokens the model reads."""
        ...

    def __call__(self, text: str, *, add_special_tokens: bool, truncation: bool, verbose: bool) -> Any:
        """Tokenises; the result has `input_ids`."""
        ...


@dataclass(frozen=True)
class Positions:
    """Token positions of a concept in one prompt; special tokens count.

    Attributes:
        trigger: Positions of all tokens of all occurrences of the trigger.
        class_word: Positions of the class word that belongs to each occurrence (`class_words`).
    """

    trigger: tuple[int, ...]
    class_word: tuple[int, ...] = ()

    @property
    def phrase(self) -> tuple[int, ...]:
        """Positions of trigger and class word together."""
        return tuple(sorted({*self.trigger, *self.class_word}))


def find_words(words: str, prompt: str, before: str | None = None) -> list[Span]:
    """Character spans of whole words in a prompt, ignoring case and spacing.

    Words that are not there as they are written are found with spaces for underscores, or the other way round: booru
    tags have both spellings.

    Args:
        before: A class word. In a tag of both, "ohwx_man", the words before it are found as well.
    """
    return list(_found(words, before, prompt))


def find_trigger(concept: Concept, prompt: str) -> list[Span]:
    """Character spans of a concept's trigger in a prompt, as `find_words` finds them before its class word."""
    return list(_found(concept.trigger, concept.class_word, prompt))


def past(prompt: str, end: int) -> int:
    """Where a prompt goes on after a word: in a tag, "ohwx_man", underscores belong to none."""
    return next((i for i in range(end, len(prompt)) if prompt[i] != "_"), len(prompt))


def _found(words: str | None, before: str | None, prompt: str) -> Sequence[Span]:
    alone, in_tags = _find_words(words or "", prompt), _in_tags(words, before, prompt)
    return sorted({*alone, *in_tags}) if in_tags else alone


def _in_tags(trigger: str | None, class_word: str | None, prompt: str) -> dict[Span, Span]:
    """Where tags of a trigger and its class word have the one and the other: "ohwx" and "man" of "ohwx_man"."""
    if "_" not in prompt or not trigger or not class_word:
        return {}
    tags = _find_words(f"{trigger.strip()}_{class_word.strip()}", prompt)
    cuts = ((start, end, ending(prompt[start:end], class_word)) for start, end in tags)
    return {(start, start + cut[0]): (start + cut[1], end) for start, end, cut in cuts if cut}


@lru_cache(maxsize=1024)  # every concept of a call asks where the words of all others are
def _find_words(words: str, prompt: str) -> tuple[tuple[int, int], ...]:
    words = unescaped(words).strip()
    # Of thousands of stored concepts few are in a prompt: letters are compared before a pattern is made.
    if words.isascii() and not all(letters in prompt.lower() for letters in _LETTERS.findall(words.lower())):
        return ()
    return _spans(words, words.split(), r"\s+", prompt) or _spans(words, parts_of(words), r"(?:\s+|_+)", prompt)


def _spans(words: str, parts: Sequence[str], between: str, prompt: str) -> tuple[tuple[int, int], ...]:
    """Spans of words by a pattern between their parts."""
    pattern = between.join(_BRACKET.sub(r"\\\\?\g<0>", re.escape(part)) for part in parts)
    # A boundary is needed only beside letters, digits and underscores: "<V1>" has its own.
    before = r"(?<!\w)" if re.match(r"\w", words) else ""
    after = r"(?!\w)" if re.search(r"\w$", words) else ""
    matches = re.finditer(before + pattern + after, prompt, re.IGNORECASE) if pattern else ()
    # To `re` the long s is an s, to tokenizers it is another letter.
    return tuple(match.span() for match in matches if spaced(match[0]) == spaced(words))


ConceptWords = tuple[str, str | None, str | None]
"""Name, trigger and class word of a concept."""

_WORDS = attrgetter("name", "trigger", "class_word")


def concept_words(concepts: Iterable[Concept]) -> tuple[ConceptWords, ...]:
    """The words of concepts, which have a hash: a concept may hold an image."""
    return tuple(map(_WORDS, concepts))


def class_words(concept: Concept, prompt: str, concepts: Sequence[Concept]) -> list[tuple[Span, Span | None]]:
    """The occurrences of a concept's trigger in a prompt, each with the class word that belongs to it.

    That is the first class word after the trigger, unless another trigger comes between: in "a sks beside a zwx cat"
    the cat belongs to zwx.

    Args:
        concepts: All concepts that it may name.
    """
    return pairs_of(_WORDS(concept), prompt, concept_words(concepts))


def pairs_of(words: ConceptWords, prompt: str, every: tuple[ConceptWords, ...]) -> list[tuple[Span, Span | None]]:
    """`class_words` of the words of a concept, among those of every concept."""
    (name, trigger, class_word), triggers = words, _triggers(prompt, every)
    nouns, pairs = _free_nouns(class_word or "", prompt, every), []
    joined = _in_tags(trigger, class_word, prompt)
    for span in _found(trigger, class_word, prompt):
        after = bisect_left(nouns, (span[1], 0))
        noun = joined.get(span) or (nouns[after] if after < len(nouns) else None)
        taken = noun is not None and triggers.of_others(name, span[1], noun[1])
        pairs.append((span, None if taken else noun))
    return pairs


class _Triggers:
    """The places of the concepts' triggers in a prompt, and of class words that a tag joins to them."""

    def __init__(self, prompt: str, every: tuple[ConceptWords, ...]) -> None:
        spans = sorted((span, name) for name, trigger, noun in every for span in _found(trigger, noun, prompt))
        self._names = [name for _, name in spans]
        self._starts = [start for (start, _), _ in spans]
        self._ends = list(accumulate((end for (_, end), _ in spans), max))  # the furthest of those that have begun
        self._nouns: dict[str, set[Span]] = {}
        for _, trigger, noun in every if "_" in prompt else ():
            self._nouns.setdefault(spaced(noun or ""), set()).update(_in_tags(trigger, noun, prompt).values())

    def nouns(self, class_word: str) -> set[Span]:
        """The places of a class word in tags that begin with a trigger."""
        return self._nouns.get(spaced(class_word), set())

    def of_others(self, name: str, start: int, end: int) -> bool:
        """Whether a trigger of another concept begins from `start` on, before `end`."""
        between = self._names[bisect_left(self._starts, start) : bisect_left(self._starts, end)]
        return bool(set(between) - {name})

    def contain(self, span: Span) -> bool:
        """Whether a span is a part of a trigger."""
        begun = bisect_right(self._starts, span[0])
        return begun > 0 and self._ends[begun - 1] >= span[1]


# Every concept of a call asks for the words of all others: found once, a prompt with many of them takes linear time.
@lru_cache(maxsize=64)
def _triggers(prompt: str, every: tuple[ConceptWords, ...]) -> _Triggers:
    return _Triggers(prompt, every)


@lru_cache(maxsize=1024)
def _free_nouns(class_word: str, prompt: str, every: tuple[ConceptWords, ...]) -> tuple[Span, ...]:
    triggers = _triggers(prompt, every)
    nouns = sorted({*_find_words(class_word, prompt), *triggers.nouns(class_word)})
    return tuple(noun for noun in nouns if not triggers.contain(noun))


def check_all_named(concepts: Iterable[Concept], prompt: str) -> None:
    """Raises ValueError if the trigger of a concept without a prompt of its own is not in a prompt."""
    for concept in concepts:
        if concept.trigger and concept.prompt is None:
            check_named(concept, prompt)


def check_named(concept: Concept, prompt: str) -> None:
    """Raises ValueError if a concept's trigger is not in a prompt."""
    _, trigger, class_word = _composed(_WORDS(concept))
    if _found(trigger, class_word, unicodedata.normalize("NFC", prompt)):
        return
    trigger = (concept.trigger or "").strip()
    raise ValueError(
        f"the trigger {trigger!r} of concept {concept.name!r} is not in the prompt {shortened(prompt)}; "
        f"write {(concept.phrase or trigger)!r} where the concept is meant"
    )


def locate(tokenizer: Tokenizer, prompt: str, concept: Concept, concepts: Sequence[Concept] = ()) -> Positions:
    """The token positions of a concept's trigger and class word in a prompt.

    Args:
        concept: A concept with a trigger.
        concepts: All concepts that it may name.

    Raises:
        ValueError: If the trigger is missing from the prompt, lies beyond the tokenizer's limit, or is joined to
            punctuation in a way that changes its tokens.
    """
    prompt = unicodedata.normalize("NFC", prompt)
    occurrences = pairs_of(_composed(_WORDS(concept)), prompt, _all_composed(concept_words(concepts)))
    if not occurrences:
        check_named(concept, prompt)
    triggers, nouns = [span for span, _ in occurrences], sorted({noun for _, noun in occurrences if noun})
    positions = (
        [p for span in spans for p in span_positions(tokenizer, prompt, span, concept)] for spans in (triggers, nouns)
    )
    return Positions(*map(tuple, positions))


def _composed(words: ConceptWords) -> ConceptWords:
    """The words in NFC, as tokenizers read text: a combining accent would look like the end of a word."""
    name, trigger, class_word = words
    return name, unicodedata.normalize("NFC", trigger or ""), unicodedata.normalize("NFC", class_word or "")


@lru_cache(maxsize=64)
def _all_composed(every: tuple[ConceptWords, ...]) -> tuple[ConceptWords, ...]:
    return tuple(map(_composed, every))


def span_positions(tokenizer: Tokenizer, prompt: str, span: tuple[int, int], concept: Concept) -> Sequence[int]:
    """Token positions of a span of whole words, counted after the tokens of everything before it.

    In a chat template, by the characters of each token (`TemplateTokenizer`).

    Args:
        prompt: The text, with composed letters (NFC).
        span: Span of characters in the prompt.
        concept: The concept with these words, for messages.
    """
    if isinstance(tokenizer, TemplateTokenizer):
        return tokenizer.positions(prompt, *span)
    if isinstance(tokenizer, LongTokenizer):
        parts = tokenizer.parts(prompt, *span)
        return [
            before + position
            for text, part, before in parts
            for position in span_positions(tokenizer.tokenizer, text, part, concept)
        ]

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids

    start, end = span
    words = prompt[start:end]
    inner = start + len(words) - len(words.lstrip(_EDGES)), end - len(words) + len(words.rstrip(_EDGES))
    # A space before the words is a part of their first token to some tokenizers, and no token to others.
    before, wanted = len(ids(prompt[:start].rstrip())), ids(words)
    read: Sequence[int] = range(before, before + len(wanted))
    if ids(prompt)[before : before + len(wanted)] != wanted and not (read := _inside_tag(tokenizer, prompt, span)):
        if inner != span and inner[0] < inner[1]:  # a bracket may be one token with the comma after it
            return span_positions(tokenizer, prompt, inner, concept)
        raise ValueError(
            f"{words!r} of concept {concept.name!r} does not keep its own tokens in {shortened(prompt)}: "
            "put spaces around it or choose a trigger of letters"
        )
    front, back = special_tokens(tokenizer)
    limit = tokenizer.model_max_length - front - back
    if read[-1] >= limit:
        raise ValueError(
            f"{words!r} of concept {concept.name!r} stands at tokens {read[0] + 1} to {read[-1] + 1}, "
            f"but the model reads only {limit}; move it forward or shorten the prompt {shortened(prompt)}"
        )
    return [front + position for position in read]


def _inside_tag(tokenizer: Any, prompt: str, span: Span) -> list[int]:
    """Tokens of a word that an underscore joins to another, by the characters of each, if the tokenizer knows these.

    To tokenizers that take the space before a word into its token, such a word is another one than alone.
    """
    start, end = span
    if "_" not in (prompt[start - 1 : start], prompt[end : end + 1]) or not getattr(tokenizer, "is_fast", False):
        return []
    read = tokenizer(
        prompt, add_special_tokens=False, truncation=False, verbose=False, return_offsets_mapping=True
    )["offset_mapping"]  # fmt: skip
    return [i for i, (first, last) in enumerate(read) if first < end and last > start]


def special_tokens(tokenizer: Tokenizer) -> tuple[int, int]:
    """How many special tokens a tokenizer puts before and after a text: CLIP's one each, T5's one at the end."""
    bare, whole = (
        list(tokenizer("a", add_special_tokens=special, truncation=False, verbose=False).input_ids)
        for special in (False, True)
    )
    front = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return front, len(whole) - len(bare) - front


@dataclass(frozen=True)
class Mention:
    """Words that name a concept in a text, which need not have its trigger.

    Attributes:
        words: The words, matched as whole words.
        which: Indices of the occurrences (outside triggers) that name the concept; None means all.
    """

    words: tuple[str, ...]
    which: tuple[int, ...] | None = None


def free_nouns(concept: Concept, prompt: str, concepts: Sequence[Concept]) -> list[Span]:
    """Spans of a concept's class word in a prompt, except those inside a trigger."""
    return list(_free_nouns(concept.class_word or "", prompt, concept_words(concepts)))


def own_nouns(concept: Concept, prompt: str, concepts: Sequence[Concept]) -> tuple[int, ...]:
    """Indices of the free nouns that belong to the concept (`class_words`).

    In "a sks cat and a zwx cat" it is (0,) for sks, and (1,) for zwx. A bystander has those that belong to no trigger;
    of several with one class word each has one of them, in their order.
    """
    nouns = free_nouns(concept, prompt, concepts)
    if concept.is_bystander:
        owned = {noun for other in concepts for _, noun in class_words(other, prompt, concepts) if noun}
        left = [k for k, noun in enumerate(nouns) if not any(_overlap(noun, other) for other in owned)]
        word = spaced(concept.class_word or "")
        alike = [c.name for c in concepts if c.is_bystander and spaced(c.class_word or "") == word]
        if len(alike) > 1 and concept.name in alike:
            left = left[alike.index(concept.name) :][:1]
        return tuple(left)
    return tuple(sorted({nouns.index(noun) for _, noun in class_words(concept, prompt, concepts) if noun}))


def is_named(concept: Concept, prompt: str, concepts: Sequence[Concept]) -> bool:
    """Whether a prompt has a concept's trigger, or of a bystander a class word that is its own."""
    if concept.is_bystander:
        return bool(own_nouns(concept, prompt, concepts))
    return bool(find_trigger(concept, prompt))


def _overlap(first: Span, second: Span) -> bool:
    return first[0] < second[1] and second[0] < first[1]


def locate_mention(
    tokenizer: Tokenizer, prompt: str, concept: Concept, mention: Mention, concepts: Sequence[Concept]
) -> tuple[int, ...]:
    """The token positions of the words that name a concept.

    Raises:
        ValueError: If one of the words is not in the prompt, or as for `locate`.
    """
    prompt = unicodedata.normalize("NFC", prompt)
    if mention.which is None:
        spans = [span for word in mention.words for span in find_words(unicodedata.normalize("NFC", word), prompt)]
    else:
        class_word = unicodedata.normalize("NFC", concept.class_word or "")
        nouns = _free_nouns(class_word, prompt, _all_composed(concept_words(concepts)))
        spans = [nouns[k] for k in mention.which if k < len(nouns)]
    if not spans:
        raise ValueError(
            f"none of the words {mention.words} that name {concept.name!r} is in the prompt {shortened(prompt)}"
        )
    return tuple(sorted({p for span in spans for p in span_positions(tokenizer, prompt, span, concept)}))


def check_disjoint(concepts: Sequence[Concept], positions: Sequence[Positions], prompt: str) -> None:
    """Raises ValueError if the triggers of two concepts share a token."""
    owner: dict[int, Concept] = {}
    for concept, place in zip(concepts, positions, strict=True):
        for position in place.trigger:
            if position in owner:
                other = owner[position]
                raise ValueError(
                    f"the triggers of concepts {other.name!r} ({other.trigger!r}) and {concept.name!r} "
                    f"({concept.trigger!r}) share words of {shortened(prompt)}; each concept needs a trigger of its own"
                )
            owner[position] = concept


def token_mask(positions: Sequence[Sequence[Sequence[int]]], tokens: int) -> Tensor:
    """A mask with 1 at the given positions, by prompt and concept. Shape: [prompts, tokens, concepts], fp32."""
    mask = torch.zeros(len(positions), tokens, len(positions[0]) if positions else 0)
    for row, concepts in enumerate(positions):
        for column, indices in enumerate(concepts):
            mask[row, list(indices), column] = 1.0
    return mask
