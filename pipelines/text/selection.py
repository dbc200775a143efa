"""Finds the concepts that a prompt names: by their triggers, or by class words that only one of them has.

Nothing is guessed: an ambiguous word is an error or a note, and a word spelled almost like a trigger is a note. Of
versions of one LoRA, whose words are the same ("cat", "cat-tara", "cat-000004"), that with the shortest name is meant.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from unicodedata import normalize

from lora_compose.pipelines.concepts.tags import take_tags
from lora_compose.pipelines.scene.scene import Concept
from lora_compose.pipelines.support.words import spaced
from lora_compose.pipelines.text.tokens import Span, class_words, find_trigger, find_words

_ALIKE = 0.75
"""Two words with at least this share of letters in common, in order, may be the same word mistyped."""

_MOST = 200  # words of a prompt that are compared, and concepts that a message lists


@dataclass(frozen=True)
class NamedConcepts:
    """The concepts that a prompt names.

    Attributes:
        names: Names of the concepts, in the order of the prompt.
        prompt: The prompt, with the triggers inserted of concepts that it names only by class word; methods need them.
        reasons: A line for each concept: the word by which it was chosen.
        notes: Words that may name a concept that was not chosen.
        weights: Of those that a tag names, `<lora:cat:0.8>`.
    """

    names: tuple[str, ...]
    prompt: str
    reasons: tuple[str, ...]
    notes: tuple[str, ...]
    weights: Mapping[str, float] = field(default_factory=dict)

    @property
    def concepts(self) -> list[str | Concept]:
        """Names, and concepts with the weights of tags."""
        return [Concept(name=name, weight=self.weights[name]) if name in self.weights else name for name in self.names]


def choose_concepts(prompt: str, known: Mapping[str, Concept]) -> NamedConcepts:
    """The concepts that a prompt names.

    A concept is named by its trigger. Where several share a trigger, the class word that follows it decides. A concept
    whose class word no other has is named by that word alone, where it stands once and belongs to no trigger. Raises
    ValueError if a trigger means several concepts, or the prompt names none.
    """
    prompt, weights = take_tags(normalize("NFC", prompt), known)
    words, versions = _without_versions({name: _words(concept) for name, concept in known.items()}, weights)
    by_trigger = _by_trigger(prompt, words)
    by_class, notes = _by_class_word(prompt, words, by_trigger)
    spans = {**by_trigger, **by_class}
    notes += _near_misses(prompt, [concept for name, concept in words.items() if name not in spans])
    if not spans and not weights:
        raise ValueError("\n".join([_nothing(words), *notes]))
    names = sorted(spans, key=lambda name: spans[name])
    reasons = [
        f"{name}: by its {'trigger' if name in by_trigger else 'class word'} {prompt[slice(*spans[name])]!r}"
        + (f" (the words of {', '.join(versions[name])}, too)" if versions.get(name) else "")
        for name in names
    ]
    for name in reversed(names):
        if name in by_class and (trigger := words[name].trigger):
            start = by_class[name][0]
            prompt = f"{prompt[:start]}{trigger} {prompt[start:]}"
            reasons[names.index(name)] += f", before which its trigger {trigger!r} is written"
    tagged = [name for name in weights if name not in names]
    reasons += [f"{name}: by its tag" for name in tagged]
    return NamedConcepts((*names, *tagged), prompt, tuple(reasons), tuple(notes), weights)


def _words(concept: Concept) -> Concept:
    """The concept with NFC-normalised words; blank ones become None."""
    words = {name: normalize("NFC", getattr(concept, name) or "").strip() or None for name in ("trigger", "class_word")}
    return concept.model_copy(update=words)


def _without_versions(
    known: Mapping[str, Concept], tagged: Collection[str]
) -> tuple[dict[str, Concept], dict[str, list[str]]]:
    """Splits concepts with equal words into the tagged one, or the one whose name begins all others, and the rest."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, concept in known.items():
        groups.setdefault((spaced(concept.trigger or ""), spaced(concept.class_word or "")), []).append(name)
    others: dict[str, list[str]] = {}
    for words, group in groups.items():
        kept = [name for name in group if name in tagged] or [min(group, key=len)]
        if any(words) and (kept[0] in tagged or all(name.startswith(kept[0]) for name in group)):
            others[kept[0]] = [name for name in group if name not in kept]
    dropped = {name for group in others.values() for name in group}
    return {name: concept for name, concept in known.items() if name not in dropped}, others


def _by_trigger(prompt: str, known: Mapping[str, Concept]) -> dict[str, Span]:
    """The first occurrence of each trigger in the prompt that is not inside a longer trigger."""
    spans = {name: find_trigger(concept, prompt) for name, concept in known.items()}
    all_spans = [span for places in spans.values() for span in places]
    outermost = {name: [span for span in places if not _inside(span, all_spans)] for name, places in spans.items()}
    groups: dict[str, list[str]] = {}
    for name, places in outermost.items():
        if places:
            groups.setdefault(spaced(known[name].trigger or ""), []).append(name)
    return {(name := _only(prompt, group, known)): outermost[name][0] for group in groups.values()}


def _inside(span: Span, others: Sequence[Span]) -> bool:
    return any(start <= span[0] and span[1] <= end and (start, end) != span for start, end in others)


def _only(prompt: str, group: Sequence[str], known: Mapping[str, Concept]) -> str:
    """The one of several concepts with the same trigger that the prompt means."""
    meant = [name for name in group if known[name].class_word and find_words(known[name].phrase, prompt)]
    choices = meant if len(group) > 1 else group
    if len(choices) != 1:
        trigger = known[group[0]].trigger
        listed = ", ".join(f"{name} ({known[name].phrase!r})" for name in group[:_MOST])
        raise ValueError(
            f"{trigger!r} in the prompt may be each of {len(group)} concepts: {listed}. Name the one you mean instead "
            "of 'auto', or leave the others out"
        )
    return choices[0]


def _by_class_word(
    prompt: str, known: Mapping[str, Concept], taken: Mapping[str, Span]
) -> tuple[dict[str, Span], list[str]]:
    """Where class words stand that belong to no trigger and to one concept; and notes on those of several."""
    named = [known[name] for name in taken]
    owned = {noun for concept in named for _, noun in class_words(concept, prompt, named)}
    triggers = [span for concept in named for span in find_trigger(concept, prompt)]
    groups: dict[str, list[str]] = {}
    for name, concept in known.items():
        if concept.class_word:
            groups.setdefault(spaced(concept.class_word), []).append(name)
    spans, notes = {}, []
    for word, group in groups.items():
        free = [span for span in find_words(word, prompt) if span not in owned and not _inside(span, triggers)]
        others = [name for name in group if name not in taken]
        if not free or not others:
            continue
        if len(group) == 1 and len(free) == 1:
            spans[others[0]] = free[0]
            continue
        listed = ", ".join(f"{name} ({known[name].phrase!r})" for name in group[:_MOST])
        why = f"may be {listed}" if len(group) > 1 else f"stands {len(free)} times, and may be {listed}"
        notes.append(f"{word!r} {why}: write the trigger of the concept you mean; none was chosen")
    return spans, notes


def _near_misses(prompt: str, others: Sequence[Concept]) -> list[str]:
    words = list(dict.fromkeys(re.findall(r"[^\s,.;:!?()]+", prompt)))[:_MOST]
    return [
        f"{word!r} is spelled like {concept.trigger!r}, the trigger of {concept.name}, which was not chosen"
        for concept in others[:_MOST]
        for word in words
        if concept.trigger and _alike(word.lower(), concept.trigger.lower())
    ]


def _alike(word: str, trigger: str) -> bool:
    near = word != trigger and abs(len(word) - len(trigger)) <= len(trigger) // 2
    return near and SequenceMatcher(None, word, trigger).ratio() >= _ALIKE


def _nothing(known: Mapping[str, Concept]) -> str:
    listed = [f"{name} ({concept.phrase!r})" for name, concept in known.items() if concept.phrase]
    more = f" and {len(listed) - _MOST} more" if len(listed) > _MOST else ""
    without = [name for name, concept in known.items() if not concept.phrase]
    silent = f"; known by name alone, without trigger and class word: {', '.join(without[:_MOST])}" if without else ""
    there = f"there are {', '.join(listed[:_MOST])}{more}" if listed else "no concept that could be named is known"
    return f"the prompt names no concept; {there}{silent}"
