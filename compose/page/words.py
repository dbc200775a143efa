"""Checks a prompt while it is typed: which words belong to which concept, and what is wrong with them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lora_compose.compose.figures.overlay import colour
from lora_compose.compose.page.text import markup
from lora_compose.pipelines.scene.scene import Concept
from lora_compose.pipelines.text.emphasis import plain_text
from lora_compose.pipelines.text.long_prompts import LongTokenizer, chunks_of
from lora_compose.pipelines.text.templates import TemplateTokenizer
from lora_compose.pipelines.text.textual_inversion import ExpandingTokenizer
from lora_compose.pipelines.text.tokens import (
    Mention,
    Positions,
    check_disjoint,
    class_words,
    find_words,
    free_nouns,
    locate,
    locate_mention,
    own_nouns,
)

WordKind = Literal["trigger", "class word"]


@dataclass(frozen=True, order=True)
class Mark:
    """A span of characters of a prompt that belongs to a concept."""

    start: int
    end: int
    concept: int
    kind: WordKind


@dataclass(frozen=True)
class MarkedPrompt:
    """The result of reading a prompt.

    Attributes:
        marks: Words of concepts, in order; none of them overlap.
        flags: What is wrong or doubtful, in words.
        missing: Indices of concepts that the prompt does not name.
        unready: Whether that has to be fixed before an image can be made.
        cut: The first character that the model does not read; None if it reads all.
    """

    marks: tuple[Mark, ...]
    flags: tuple[str, ...]
    missing: tuple[int, ...]
    unready: bool
    cut: int | None


def read_prompt(prompt: str, concepts: Sequence[Concept], tokenizer: Any) -> MarkedPrompt:
    """Finds every concept's words in a prompt, as the model's tokenizer reads it; with concepts, it reads all of it."""
    marks, flags, missing, unready = [], [], [], False
    try:
        text = plain_text(prompt)
        if concepts and not isinstance(tokenizer, ExpandingTokenizer | TemplateTokenizer):  # those of UNets
            tokenizer = LongTokenizer(tokenizer, len(chunks_of(tokenizer, text)))
    except ValueError as error:
        return MarkedPrompt((), (str(error),), (), True, None)
    located: list[tuple[Concept, Positions]] = []
    for i, concept in enumerate(concepts):
        if not (concept.trigger or concept.is_bystander):
            if not concept.is_style:
                flags.append(f"{concept.name} needs a trigger word: type it in its card.")
            continue
        own = _marks(i, concepts, prompt)
        marks += own
        if not own:
            missing.append(i)
            if concept.prompt is None:
                unready |= not concept.is_bystander  # methods that do not look for it need no word of it
                where = " where it follows no trigger" if concept.is_bystander else ""
                flags.append(f"{concept.name} is missing in the prompt: write “{concept.phrase}”{where}.")
            continue
        flags += _doubts(concept, own)
        try:
            if concept.is_bystander:
                named = Mention((), own_nouns(concept, text, concepts))
                locate_mention(tokenizer, text, concept, named, concepts)
            else:
                located.append((concept, locate(tokenizer, text, concept)))
        except ValueError:
            unready = True
            flags.append(f"The words of {concept.name} are joined to other signs: put spaces around them.")
    try:
        check_disjoint([concept for concept, _ in located], [place for _, place in located], prompt)
    except ValueError:
        unready = True
        flags.append("Triggers share words; each concept needs a trigger of its own.")
    cut = None if concepts else cut_off(prompt, tokenizer)
    if cut is not None:
        rest = prompt[cut:].strip()
        rest = rest if len(rest) <= 60 else f"{rest[:57]}..."
        flags.append(f"The model reads {_limit(tokenizer)} tokens; it ignores “{rest}”.")
    return MarkedPrompt(_apart(marks), tuple(flags), tuple(missing), unready, cut)


def cut_off(prompt: str, tokenizer: Any) -> int | None:
    """The first character beyond the model's limit; None if the prompt fits. Words are not divided."""
    limit = _limit(tokenizer)

    def tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids)

    if tokens(prompt) <= limit:
        return None
    ends = [i for i, letter in enumerate(prompt) if letter.isspace()]
    fits = [end for end in ends if tokens(prompt[:end]) <= limit]
    return fits[-1] if fits else 0


def with_phrase(prompt: str, concept: Concept, others: Sequence[Concept]) -> str:
    """The prompt with the phrase of a concept that it lacks.

    A bare class word becomes the phrase; otherwise the phrase follows the last concept that the prompt names.
    """
    marks = [mark for i in range(len(others)) for mark in _marks(i, [*others, concept], prompt)]
    nouns = [
        (start, end)
        for start, end in find_words(concept.class_word or "", prompt)
        if not any(start < mark.end and mark.start < end for mark in marks)
    ]
    if nouns:
        start, end = nouns[0]
        return prompt[:start] + concept.phrase + prompt[end:]
    # How a trigger is spoken is not known.
    article = "an" if concept.is_bystander and concept.phrase[0].lower() in "aeio" else "a"
    if not marks:
        return ", ".join(filter(None, [prompt.rstrip(), f"{article} {concept.phrase}"]))
    end = max(mark.end for mark in marks)
    return f"{prompt[:end]} and {article} {concept.phrase}{prompt[end:]}"


def as_html(prompt: str, reading: MarkedPrompt) -> str:
    """The prompt with every concept's words in its colour, and struck through where the model reads nothing."""
    pieces, at = [], 0
    for mark in reading.marks:
        pieces.append(_piece(prompt, at, mark.start, reading.cut))
        inside = _piece(prompt, mark.start, mark.end, reading.cut)
        kind = "trigger" if mark.kind == "trigger" else "noun"
        pieces.append(f'<span class="lc-{kind}" style="--concept:{colour(mark.concept)}">{inside}</span>')
        at = mark.end
    return f'<p class="lc-prompt">{"".join(pieces)}{_piece(prompt, at, len(prompt), reading.cut)}</p>'


def _limit(tokenizer: Any) -> int:
    """Tokens that are read besides those for start and end."""
    return tokenizer.model_max_length - 2


def _piece(prompt: str, start: int, end: int, cut: int | None) -> str:
    seen = markup(prompt[start : end if cut is None else min(end, max(start, cut))])
    unseen = "" if cut is None or cut >= end else markup(prompt[max(start, cut) : end])
    return f"{seen}<del>{unseen}</del>" if unseen else seen


def _marks(i: int, concepts: Sequence[Concept], prompt: str) -> list[Mark]:
    """The words of the concept with an index: trigger and class word; those of a bystander belong to no trigger."""
    concept = concepts[i]
    if concept.is_bystander:
        nouns = free_nouns(concept, prompt, concepts)
        return [Mark(*nouns[k], i, "class word") for k in own_nouns(concept, prompt, concepts)]
    pairs = class_words(concept, prompt, concepts)
    bound = {noun for _, noun in pairs if noun is not None}
    return [Mark(*trigger, i, "trigger") for trigger, _ in pairs] + [Mark(*noun, i, "class word") for noun in bound]


def _doubts(concept: Concept, marks: Sequence[Mark]) -> list[str]:
    doubts = []
    if concept.class_word and all(mark.kind == "trigger" for mark in marks):
        doubts.append(f"Write “{concept.class_word}” after the trigger “{concept.trigger}” of {concept.name}.")
    times = sum(mark.kind == "trigger" for mark in marks)
    if times > 1:
        doubts.append(f"The trigger of {concept.name} occurs {times} times; all name the same {concept.name}.")
    return doubts


def _apart(marks: Sequence[Mark]) -> tuple[Mark, ...]:
    """The marks that begin inside no earlier one."""
    kept: list[Mark] = []
    for mark in sorted(marks):
        if not kept or mark.start >= kept[-1].end:
            kept.append(mark)
    return tuple(kept)
