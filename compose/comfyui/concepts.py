"""Concepts as people give them in nodes, and the composition that a method makes of them."""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_compose.attention import Lora
from lora_compose.attention.masks import Box, box_mask
from lora_compose.compose.comfyui.composition import UNIT, Composition, Conditioning, Draft, Region
from lora_compose.compose.comfyui.tokens import find_tokens, tokens_of
from lora_compose.pipelines.scene.scene import Concept as SceneConcept
from lora_compose.pipelines.text.prompts import about, surroundings, without_triggers
from lora_compose.pipelines.text.tokens import class_words, find_words

logger = logging.getLogger("lora_compose")
Encode = Callable[[str, Sequence[int]], Conditioning]
"""Encodes a text with the text-encoder LoRAs of some concepts."""

_SIDE = 256
"""Rows and columns of a box that is shown as a mask."""


@dataclass(frozen=True, eq=False)
class Concept:
    """One LoRA, as given. The region is None for one that acts everywhere, or where a draft finds it."""

    path: Path
    trigger: str
    class_word: str
    weight: float
    region: Region | None
    prompt: str = ""

    @classmethod
    def of(
        cls,
        path: Path,
        trigger: str,
        class_word: str,
        weight: float,
        box: str = "",
        mask: Tensor | None = None,
        prompt: str = "",
    ) -> "Concept":
        """A concept of what a node has.

        Args:
            path: The LoRA.
            trigger: The trigger, if it has one.
            class_word: The noun after it.
            weight: Factor on the LoRA.
            box: left,top,right,bottom as fractions of the image, or nothing.
            mask: ComfyUI's masks, of which the first counts. Shape: [(masks,) height, width].
            prompt: What its region reads, or nothing.

        Raises:
            ValueError: For a box and a mask, a box that is none, or an empty mask.
        """
        region: Region | None = _box(box) if box.strip() else None
        if mask is not None:
            if region is not None:
                raise ValueError(f"{path.name} has a box and a mask; clear the box, or disconnect the mask")
            region = mask.reshape(-1, *mask.shape[-2:])[0].detach().float().cpu()
            if not region.any():
                raise ValueError(f"the mask of {path.name} is empty; paint where the concept is meant")
        return cls(path, trigger.strip(), class_word.strip(), weight, region, prompt.strip())

    @property
    def phrase(self) -> str:
        """Trigger and class word, as they are written in a text."""
        return f"{self.trigger} {self.class_word}".strip()

    @property
    def in_scene(self) -> SceneConcept:
        """As our pipelines know it."""
        return SceneConcept(
            name=self.phrase or self.path.stem,
            trigger=self.trigger or None,
            class_word=self.class_word or None,
            prompt=self.prompt or None,
        )


def _box(text: str) -> Box:
    sides = re.split(r"\s*,\s*", text.strip())
    try:
        left, top, right, bottom = (round(float(side) * UNIT) for side in sides)
        if not (0 <= left < right <= UNIT and 0 <= top < bottom <= UNIT):
            raise ValueError
    except (ValueError, OverflowError) as error:
        raise ValueError(
            f"the box {text.strip()!r} cannot be used: write left,top,right,bottom as fractions of the image, for "
            "example 0,0.1,0.5,0.9"
        ) from error
    return left, top, right, bottom


def boxes_of(text: str) -> Sequence[Box | None]:
    """The boxes in a text, one a line; "none" is one that acts everywhere. Raises ValueError as `Concept.of`."""
    lines = [line for line in text.splitlines() if line.strip()]
    return [None if line.strip().lower() == "none" else _box(line) for line in lines]


def with_boxes(concepts: Sequence[Concept], boxes: Sequence[Box | None]) -> Sequence[Concept]:
    """Concepts with boxes, in their order. Raises ValueError if there are not as many, or a concept has a region."""
    if len(boxes) != len(concepts):
        raise ValueError(
            f"there are {len(boxes)} boxes for {len(concepts)} concepts; write one a line, and none for a concept that "
            "acts everywhere"
        )
    for concept in concepts:
        if concept.region is not None:
            raise ValueError(f"{concept.path.name} has a box or a mask in its Concept node already; clear it there")
    return tuple(replace(concept, region=box) for concept, box in zip(concepts, boxes, strict=True))


def with_masks(concepts: Sequence[Concept], masks: Tensor) -> Sequence[Concept]:
    """Concepts in which subjects have masks as their regions, in the order of all concepts.

    Args:
        masks: Shape: [concepts, height, width].

    Raises:
        ValueError: If there are not as many.
    """
    if len(masks) != len(concepts):
        raise ValueError(f"there are {len(masks)} masks for {len(concepts)} concepts; connect one for each")
    subjects = subjects_of(concepts)
    return [
        replace(one, region=mask) if i in subjects else one
        for i, (one, mask) in enumerate(zip(concepts, masks.detach().float().cpu(), strict=True))
    ]


def drawn(concepts: Sequence[Concept]) -> Tensor:
    """Boxes as masks; those of concepts without one are white. Shape: [concepts, height, width]."""
    size = (_SIDE, _SIDE)
    boxes = [(0, 0, UNIT, UNIT) if concept.region is None else concept.region for concept in concepts]
    return torch.stack([box_mask(box, (UNIT, UNIT), size) for box in boxes if isinstance(box, tuple)])


def composition_of(
    concepts: Sequence[Concept],
    loras: Sequence[Lora],
    clip: Any,
    encode: Encode,
    text: str,
    method: str,
    texts: str = "auto",
    *,
    joint: bool = False,
) -> tuple[Composition, Conditioning]:
    """What concepts do in a model by a method, and the conditioning for it.

    Args:
        concepts: The concepts.
        loras: Their factors.
        clip: ComfyUI's CLIP, whose tokenizer finds the triggers.
        encode: Encodes texts.
        text: The text.
        method: "draft", "regional", "tara" or "merge".
        texts: What the cells of a region read: "shared", the text; "regions", one of its own; or "auto".
        joint: Whether the model has text and image in one sequence.

    Raises:
        ValueError: If the method needs regions or words that are not there, or has no use for some that are.
    """
    weights = torch.tensor([concept.weight for concept in concepts])
    regions, ones = [concept.region for concept in concepts], torch.ones(1, len(concepts))
    plan = Composition(loras, weights, regions, ones)
    if method == "draft":
        return _draft(plan, concepts, clip, encode, text, texts, joint)
    if method == "regional":
        return _regional(plan, concepts, encode, text, texts, joint)
    if any(region is not None for region in regions):
        raise ValueError(f"{method} does not use boxes and masks; take them away, or choose regional")
    if texts == "regions" or any(concept.prompt for concept in concepts):
        raise ValueError(f"{method} reads one text; clear the prompts of concepts, or choose regional")
    if method == "merge":
        everyone = range(len(concepts))
        return replace(plan, text_of_others=True, image_of_others=True), encode(text, everyone)
    conditioning = encode(text, ())
    found = [_trigger(clip, text, concept, tokens_of(*conditioning[0])) for concept in concepts]
    words = torch.zeros(found[0][1], len(concepts))
    for n, (positions, _) in enumerate(found):
        if words[list(positions)].any():
            raise ValueError(f"the trigger {concepts[n].trigger!r} shares words with another one; each needs its own")
        words[list(positions), n] = 1
    return replace(plan, words=words, image_of_others=True, tokens=len(words)), conditioning


def _regional(
    plan: Composition, concepts: Sequence[Concept], encode: Encode, text: str, texts: str, joint: bool
) -> tuple[Composition, Conditioning]:
    owners = [i for i, concept in enumerate(concepts) if concept.region is not None]
    styles = [i for i in range(len(concepts)) if i not in owners]
    if not owners:
        raise ValueError("regional needs to know where concepts are: give at least one a box or a mask")
    for i in styles:
        if concepts[i].prompt:
            raise ValueError(
                f"{concepts[i].path.name} has a prompt, and no region that reads it; give it a box or a mask"
            )
    unnamed = _unnamed([concepts[i] for i in owners], text)
    if texts == "auto" and joint and unnamed:
        logger.warning("all regions read one text, since none can be made about %s", ", ".join(unnamed))
    own = any(concept.prompt for concept in concepts) or (joint and not unnamed)
    if texts == "regions" or (texts == "auto" and own):
        return _with_texts(plan, concepts, owners, styles, encode, text, joint)
    _check_no_prompts(concepts)
    return plan, encode(text, styles)


def _draft(
    plan: Composition, concepts: Sequence[Concept], clip: Any, encode: Encode, text: str, texts: str, joint: bool
) -> tuple[Composition, Conditioning]:
    subjects = subjects_of(concepts)
    styles = [i for i in range(len(concepts)) if i not in subjects]
    if len(subjects) < 2:
        raise ValueError("draft divides the image between subjects: give two or more a trigger and a class word")
    mine, searched = [*subjects.values()], [i for i in subjects if concepts[i].region is None]
    for i in searched:
        if not concepts[i].class_word:
            raise ValueError(f"draft looks for the class word of {concepts[i].path.name}: type it in its Concept node")
    classes = [(concept.class_word or "").lower() for concept in mine]
    own = len({*classes}) < len(classes) or any(concept.prompt for concept in concepts)
    by_regions = texts == "regions" or (texts == "auto" and own)
    if by_regions:
        plan, conditioning = _with_texts(plan, concepts, [*subjects], styles, encode, text, joint)
        plan = replace(plan, isolate=not joint)  # it tears the images of transformers apart
    else:
        _check_no_prompts(concepts)
        conditioning = encode(text, styles)
        if not joint:
            plan = replace(plan, phrases=_phrases(clip, text, concepts, subjects, tokens_of(*conditioning[0])))
    plan = replace(plan, tokens=tokens_of(*conditioning[0]))
    if not searched:
        return plan, conditioning
    plain = without_triggers(text, mine)
    of_draft, words = _once(encode, plain, styles), torch.zeros(0, 0)
    for n, i in enumerate(subjects):
        if i in searched:
            positions, tokens = find_tokens(clip, plain, concepts[i].class_word, tokens_of(*of_draft[0]))
            words = words if len(words) else torch.zeros(tokens, len(subjects))
            words[list(positions), n] = 1 / len(positions)
    return replace(plan, draft=Draft(of_draft, words, subjects, by_regions)), conditioning


def subjects_of(concepts: Sequence[Concept]) -> Mapping[int, SceneConcept]:
    """The concepts that are no styles, as our pipelines know them, with the index of each."""
    return {i: one.in_scene for i, one in enumerate(concepts) if one.phrase or one.prompt or one.region is not None}


def texts_about(concepts: Sequence[Concept], text: str) -> Sequence[str]:
    """A text about each of some subjects. Raises ValueError if none can be made."""
    if unnamed := _unnamed(concepts, text):
        raise ValueError(
            f"no text can be made about {', '.join(unnamed)}: write its trigger in the text, or give it a prompt"
        )
    mine = [one.in_scene for one in concepts]
    return [about(one, text, mine) for one in mine]


def _with_texts(
    plan: Composition,
    concepts: Sequence[Concept],
    owners: Sequence[int],
    styles: Sequence[int],
    encode: Encode,
    text: str,
    joint: bool,
) -> tuple[Composition, Conditioning]:
    """A text for the image, and one for each region; and the conditioning of the whole text, without triggers."""
    mine, texts = [concepts[i].in_scene for i in owners], texts_about([concepts[i] for i in owners], text)
    plain, bare = without_triggers(text, mine), surroundings(text, mine)
    # On UNets, cells outside of regions read of the surroundings alone, as in our pipelines.
    kept = all(find_words(concepts[i].trigger, bare) for i in styles if concepts[i].trigger)
    first = bare if kept and not joint else plain
    every = [_once(encode, first, styles)]
    every += [_once(encode, own, [*styles, i]) for i, own in zip(owners, texts, strict=True)]
    everywhere = torch.tensor([float(i in styles) for i in range(len(concepts))])
    words = torch.stack([everywhere, *(everywhere + torch.eye(len(everywhere))[list(owners)])])
    whole = every[0] if first == plain else _once(encode, plain, styles)  # also what describes the image as a whole
    tokens = tokens_of(*whole[0])
    return replace(plan, words=words, texts=every, owners=owners, tokens=tokens), whole


def _once(encode: Encode, text: str, which: Sequence[int]) -> Conditioning:
    found = encode(text, which)
    if len(found) != 1:
        raise ValueError("the CLIP has LoRA hooks with a schedule; leave them out with draft and texts of regions")
    return found


def _phrases(
    clip: Any, text: str, concepts: Sequence[Concept], subjects: Mapping[int, SceneConcept], kept: int
) -> Tensor:
    """1 at the tokens from a trigger to its class word, or of the class word alone. Shape: [tokens, concepts]."""
    phrases = torch.zeros(0, 0)
    for i, one in subjects.items():
        spans = [
            (start, (noun or (start, end))[1]) for (start, end), noun in class_words(one, text, [*subjects.values()])
        ]
        for said in {text[start:end] for start, end in spans} or {concepts[i].class_word} - {""}:
            positions, tokens = find_tokens(clip, text, said, kept)
            phrases = phrases if len(phrases) else torch.zeros(tokens, len(concepts))
            phrases[list(positions), i] = 1
    return phrases


def _unnamed(concepts: Sequence[Concept], text: str) -> list[str]:
    """Concepts of which no text can be made: their words are not in the text."""
    return [one.path.name for one in concepts if not (one.prompt or find_words(one.trigger or one.class_word, text))]


def _check_no_prompts(concepts: Sequence[Concept]) -> None:
    for concept in concepts:
        if concept.prompt:
            raise ValueError(
                f"{concept.path.name} has a prompt, and all regions read one text; clear it, or set texts to regions"
            )


def _trigger(clip: Any, text: str, concept: Concept, kept: int) -> tuple[Sequence[int], int]:
    if not concept.trigger:
        raise ValueError(f"tara needs a trigger for {concept.path.name}: type it in its Concept node")
    try:
        return find_tokens(clip, text, concept.trigger, kept)
    except ValueError as error:
        raise ValueError(f"{concept.path.name}: {error}: {concept.phrase!r}") from error
