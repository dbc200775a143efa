"""What a prompt lacks to name a concept, and what to type; proposals come from the file and from the prompt."""

import logging
import re
from collections.abc import Sequence
from typing import Protocol

from lora_compose.pipelines.formats.triggers import Candidate, Words, divided, is_usual_noun
from lora_compose.pipelines.scene.scene import Concept
from lora_compose.pipelines.support.notes import warn
from lora_compose.pipelines.text.tokens import find_trigger, find_words

logger = logging.getLogger(__name__)

_MOST = 3  # proposals that a message lists


class Described(Protocol):
    """A concept as far as it is looked at before a call; its LoRA need not have been read."""

    @property
    def concept(self) -> Concept:
        """The concept with its words."""
        ...

    @property
    def words(self) -> Words:
        """The words that its file names."""
        ...

    @property
    def trained_with(self) -> str | None:
        """How the LoRA was trained ("tara")."""
        ...


def missing_words(described: Described, prompt: str) -> str:
    """What is missing if the prompt does not have the concept's trigger followed by its class word."""
    concept = described.concept
    name, trigger, noun = concept.name, concept.trigger, concept.class_word
    if not trigger:
        return missing_trigger(described, [prompt])
    if not noun and (last := divided(trigger)[1]):
        give = _give(name, "class_word", [Candidate(last, "in the trigger")], last)
        there = "the prompt stays as it is" if find_trigger(concept, prompt) else f"write {trigger!r} in the prompt"
        return f"{name} has no class word of its own, but a trigger that ends with one: {give}; {there}"
    if not noun:
        after = [*_after(trigger, prompt), *_in_prompt_first(described.words.class_words, [prompt])]
        return (
            f"{name} has no class word: {_give(name, 'class_word', after, 'cat')}, and write it after {trigger!r}"
            + (_listed(after))
        )
    if not find_trigger(concept, prompt):
        return f"the prompt lacks {trigger!r}, the trigger of {name}: write {concept.phrase!r}"
    return f"the prompt has {trigger!r} without {noun!r} after it: write {concept.phrase!r}"


def missing_noun(bystander: Concept) -> str:
    """What is missing if the prompt does not have the class word of a bystander where it belongs to no trigger."""
    name, noun = bystander.name, bystander.class_word
    return f"the prompt does not name the bystander {name}: write {noun!r} in it, beside those that have a trigger"


def missing_trigger(described: Described, prompts: Sequence[str]) -> str:
    """What to type for a concept without a trigger; candidates that are in the prompts come first."""
    if described.concept.is_bystander:
        return missing_noun(described.concept)
    candidates, name = _in_prompt_first(described.words.triggers, prompts), described.concept.name
    give = _give(name, "trigger", candidates, "sks")
    return f"{name} has no trigger: {give}, and write it in the prompt{_listed(candidates)}"


def tell_words(described: Described, given: Concept) -> None:
    """Logs the trigger that a described concept, unlike the given one, has from its file; warns if there is none."""
    concept, words = described.concept, described.words
    if concept.trigger and not given.trigger and words.where:
        logger.info("concept %s: trigger %r, from its file (%s)", concept.name, concept.trigger, words.where)
    if concept.trigger or concept.is_style or not words.triggers:
        return
    warn(
        f"concept {concept.name!r} has no trigger, so methods cannot find it by its words{_listed(words.triggers)}. "
        "Give the one that was trained: "
        f"load_concept({concept.lora!r}, {concept.name!r}, trigger={words.triggers[0].words!r})"
    )


def _give(name: str, field: str, candidates: Sequence[Candidate], example: str) -> str:
    if not candidates:
        return f"give it one, such as Concept(name={name!r}, {field}={example!r})"
    return f"give it one, Concept(name={name!r}, {field}={candidates[0].words!r})"


def _listed(candidates: Sequence[Candidate]) -> str:
    listed = ", ".join(f"{candidate.words!r} ({candidate.where})" for candidate in candidates[:_MOST])
    return f"; there is {listed}" if listed else ""


def _in_prompt_first(candidates: Sequence[Candidate], prompts: Sequence[str]) -> list[Candidate]:
    return sorted(candidates, key=lambda candidate: not any(find_words(candidate.words, prompt) for prompt in prompts))


def _after(trigger: str, prompt: str) -> list[Candidate]:
    """The word after the trigger in the prompt, if it is a usual class word."""
    words = [re.match(r"[\s,]+(\w+)", prompt[end:]) for _, end in find_words(trigger, prompt)]
    return [Candidate(word[1], "in the prompt") for word in words if word and is_usual_noun(word[1])][:1]
