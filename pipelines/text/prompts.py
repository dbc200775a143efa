"""Prompts made from a scene's prompt: without the triggers, about one concept alone, and about none."""

import re
from collections.abc import Sequence
from functools import lru_cache

from lora_compose.pipelines.scene.scene import Concept
from lora_compose.pipelines.support.spelling import shortened
from lora_compose.pipelines.text.emphasis import replaced, substituted
from lora_compose.pipelines.text.tokens import (
    ConceptWords,
    Span,
    concept_words,
    find_trigger,
    find_words,
    free_nouns,
    own_nouns,
    pairs_of,
    past,
)

_LEADING_UP = re.compile(r"(^|\s)(of|with|showing)?(\s*\b(an?|the|my|your|his|her|its|our|their))?\s*$", re.IGNORECASE)
"""Words before a list of concepts that have no meaning without it: "a photo of a"."""


_ARTICLE = re.compile(r"\b(an?)\s+$", re.IGNORECASE)


def without_triggers(prompt: str, concepts: Sequence[Concept]) -> str:
    """The prompt in plain words: "an alc woman and a zwx dog" becomes "a woman and a dog"."""
    for concept in concepts:
        for start, end in reversed(find_trigger(concept, prompt)):
            before, after = prompt[:start], prompt[past(prompt, end) :]
            nouns = find_words(concept.class_word or "", after)
            if nouns and not after[: nouns[0][0]].strip() and after[nouns[0][0]].lower() != "u":  # "an umbrella"
                before = _with_article(before, "an" if after[nouns[0][0]].lower() in "aeio" else "a")
            prompt = before + after
    return _tidy(prompt)


def surroundings(prompt: str, concepts: Sequence[Concept], others: Sequence[Concept] = ()) -> str:
    """The prompt without the list of concepts: "a sks cat and a zwx dog on grass" becomes "on grass".

    Args:
        others: Concepts with a trigger that stays. Where that is among the words of `concepts`, these stay as well, as
            plain words.
    """
    start, end = _list_of(concept_words(concepts), prompt)
    bare = _tidy(substituted(_LEADING_UP, "", prompt[:start]) + " " + prompt[end:]) if end else prompt
    kept = all(find_trigger(other, bare) for other in others)
    return bare if kept else without_triggers(prompt, concepts)


def about(concept: Concept, prompt: str, concepts: Sequence[Concept], *, alone: bool = False) -> str:
    """A prompt about one concept: the scene's prompt with the list of concepts replaced by its words.

    For the dog, "a photo of a sks cat and a zwx dog on grass" becomes "a photo of a zwx dog on grass". Everything
    between the first and the last concept is left out.

    Args:
        concept: The concept; if it has a prompt of its own, that is the result.
        concepts: All concepts that the prompt may name.
        alone: Whether the scene is left out as well: "a zwx dog".

    Raises:
        ValueError: If the prompt does not name it, so that none can be derived.
    """
    if concept.prompt is not None:
        return concept.prompt
    every = concept_words(concepts)
    spans = named_spans(concept, prompt, concepts)
    if not spans:
        missing = f"write {concept.phrase!r} in it" if concept.phrase else "give it a trigger and write that in it"
        raise ValueError(
            f"the prompt {shortened(prompt)} does not name the concept {concept.name!r}: {missing}, or give the "
            f"concept a prompt of its own, Concept(name={concept.name!r}, prompt=...)"
        )
    start, end = _list_of(every, prompt)
    own, before = slice(*spans[0]), prompt[:start]
    article = _ARTICLE.search(prompt[: own.start])
    if alone:
        return prompt[article.start() if article else own.start : own.stop]
    if article:
        before = _with_article(before, article[1])
    return before + prompt[own] + prompt[end:]


def _with_article(before: str, article: str) -> str:
    """A text that ends with "a" or "an", with this one of the two; other texts stay as they are."""
    match = _ARTICLE.search(before)
    if match is None:
        return before
    return replaced(before, *match.span(1), match[1][0] + article[1:].lower())


@lru_cache(maxsize=64)  # the text of every concept replaces the same list
def _list_of(every: tuple[ConceptWords, ...], prompt: str) -> Span:
    """The span from the first word that names a concept to the last; (0, 0) if there is none."""
    spans = [span for words in every for span in _named(words, prompt, every)]
    return (min(spans)[0], max(end for _, end in spans)) if spans else (0, 0)


def named_spans(concept: Concept, prompt: str, concepts: Sequence[Concept]) -> list[Span]:
    """The spans in which a prompt names a concept: from its trigger to its class word, or the class word alone.

    Those of a bystander belong to no trigger.
    """
    if concept.is_bystander:
        nouns = free_nouns(concept, prompt, concepts)
        return [nouns[k] for k in own_nouns(concept, prompt, concepts)]
    (words,) = concept_words([concept])
    return _named(words, prompt, concept_words(concepts))


def _named(words: ConceptWords, prompt: str, every: tuple[ConceptWords, ...]) -> list[Span]:
    """The spans of `named_spans`, for the words of a concept and of all."""
    _, trigger, class_word = words
    if not trigger:
        return find_words(class_word or "", prompt)
    return [(start, (noun or (start, end))[1]) for (start, end), noun in pairs_of(words, prompt, every)]


_TIDY = (
    (re.compile(r"\s*([,;:])[\s,;:]*(?=[,.;:!?]|$)"), ""),
    (re.compile(r"\s+(?=[,.;:!?])"), ""),
    (re.compile(r"\s+"), " "),
)


def _tidy(prompt: str) -> str:
    """Removes double spaces, and punctuation that has lost its words."""
    for pattern, words in _TIDY:
        prompt = substituted(pattern, words, prompt)
    prompt = prompt[len(prompt) - len(prompt.lstrip(" ,.;:!?")) :]
    return prompt[: len(prompt.rstrip(" ,;:"))]
