"""The branches of CLoRA: a prompt for each, and the words that name every concept in it.

From "a sks cat and a zwx dog on grass": the base branch reads "a cat and a dog on grass", the cat's "a sks cat and a
dog on grass", the dog's "a cat and a zwx dog on grass". All name both, so all of them see the whole image.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from lora_compose.pipelines.scene.scene import Concept
from lora_compose.pipelines.support.spelling import shortened
from lora_compose.pipelines.support.words import spaced
from lora_compose.pipelines.text.missing import missing_noun
from lora_compose.pipelines.text.prompts import without_triggers
from lora_compose.pipelines.text.tokens import Mention, free_nouns, own_nouns


@dataclass(frozen=True)
class Branch:
    """One text for all images.

    Attributes:
        subject: Index of the concept whose LoRA it has; None for the base branch.
        prompts: One for each prompt of the call.
        names: Concepts whose triggers are in it.
        mentions: By prompt, how the other concepts are named in it.
    """

    subject: int | None
    prompts: tuple[str, ...]
    names: Collection[str]
    mentions: tuple[Mapping[str, Mention], ...]


def branches_of(
    prompts: Sequence[str],
    concepts: Sequence[Concept],
    subjects: Sequence[int],
    *,
    base_prompt: str | None = None,
    words: Mapping[str, Sequence[str]] | None = None,
) -> list[Branch]:
    """The base branch and one for each subject.

    Args:
        prompts: Prompts of the call.
        concepts: All concepts of the call.
        subjects: Indices of the concepts that have a branch; the words of the others stay in every branch.
        base_prompt: The text of the base branch, instead of the prompt without triggers.
        words: By name of a concept, the words that name it, instead of its trigger and class word.

    Raises:
        ValueError: If a concept is not named in a prompt, or the word that names it is ambiguous.
    """
    return [
        branch_of(subject, prompts, concepts, subjects, base_prompt=base_prompt, words=words)
        for subject in (None, *subjects)
    ]


def branch_of(
    subject: int | None,
    prompts: Sequence[str],
    concepts: Sequence[Concept],
    subjects: Sequence[int],
    *,
    base_prompt: str | None = None,
    words: Mapping[str, Sequence[str]] | None = None,
) -> Branch:
    """The branch of a subject, or the base branch. Args and errors: as for `branches_of`."""
    subject_concepts = [concepts[i] for i in subjects]
    owner = None if subject is None else concepts[subject]
    own_text = base_prompt if owner is None else owner.prompt
    others = [concept for concept in subject_concepts if concept is not owner]
    texts = tuple(own_text or without_triggers(prompt, others) for prompt in prompts)
    mentions = tuple(
        {
            concept.name: _mention(concept, text, prompt, subject_concepts, words or {})
            for concept in subject_concepts
            if concept is not owner or concept.name in (words or {})
        }
        for text, prompt in zip(texts, prompts, strict=True)
    )
    return Branch(subject, texts, () if owner is None else (owner.name,), mentions)


def _mention(
    concept: Concept, text: str, prompt: str, subjects: Sequence[Concept], words: Mapping[str, Sequence[str]]
) -> Mention:
    """How a concept is named in a text without its trigger, made from a prompt that has it."""
    if concept.name in words:
        return Mention(tuple(words[concept.name]))
    which = own_nouns(concept, prompt, subjects)
    if concept.is_bystander and not which:
        raise ValueError(missing_noun(concept))
    if not concept.class_word or not which:
        missing = (
            f"write {concept.phrase!r} in the prompt"
            if concept.class_word
            else f"give it a class word, such as Concept(name={concept.name!r}, class_word='cat')"
        )
        trigger = f" {concept.trigger!r}" if concept.trigger else ""
        raise ValueError(
            f"the concept {concept.name!r} has to be named in the branches of the others too, which lack its trigger"
            f"{trigger}: {missing}, or give the words that name it, words={{{concept.name!r}: [...]}}"
        )
    there = len(free_nouns(concept, text, subjects))
    if there == len(free_nouns(concept, prompt, subjects)):
        return Mention((concept.class_word,), which)
    twins = [other.name for other in subjects if spaced(other.class_word or "") == spaced(concept.class_word)]
    if not there or len(twins) > 1:
        raise ValueError(
            f"the prompt {shortened(text)} has to name every concept as the prompt of the scene does, but "
            f"{concept.class_word!r} occurs {there} times; it names {' and '.join(twins)}"
        )
    return Mention((concept.class_word,), tuple(range(there)))
