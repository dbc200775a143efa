"""Concepts as people give them in nodes, and the composition that a method makes of them."""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_compose.attention import Lora
from lora_compose.attention.masks import Box
from lora_compose.compose.comfyui.composition import UNIT, Composition, Conditioning, Draft, Region, on_grid
from lora_compose.compose.comfyui.tokens import find_tokens, tokens_of
from lora_compose.compose.comfyui.weights import derived, read_weights
from lora_compose.pipelines.formats.files import trained_with
from lora_compose.pipelines.scene.method_choice import method_for
from lora_compose.pipelines.scene.scene import Concept as SceneConcept
from lora_compose.pipelines.scene.strength import WeightSchedule, read_weight
from lora_compose.pipelines.text.emphasis import Emphasis
from lora_compose.pipelines.text.prompts import about, named_spans, surroundings, without_triggers
from lora_compose.pipelines.text.tokens import find_words, own_nouns

logger = logging.getLogger("lora_compose")
Encode = Callable[[str, Sequence[int]], Conditioning]
"""Encodes a text with the text-encoder LoRAs of some concepts."""

_SIDE = 256
"""Rows and columns of a region that is shown as a mask."""


@dataclass(frozen=True, eq=False)
class Concept:
    """One LoRA, as given.

    Attributes:
        path: The LoRA.
        scene: Its words and weight, as our pipelines know them; its name is that of the file.
        region: Where it acts; None is everywhere, or where a draft finds it.
    """

    path: Path
    scene: SceneConcept
    region: Region | None = None

    @classmethod
    def of(
        cls, path: Path, trigger: str, class_word: str, weight: float, box: str = "", mask: Tensor | None = None,
        prompt: str = "", schedule: str = "",
    ) -> "Concept":  # fmt: skip
        """A concept of what a node has.

        Args:
            path: The LoRA.
            trigger: The trigger, if it has one.
            class_word: The noun after it.
            weight: Factor on the LoRA.
            box: left,top,right,bottom as fractions of the image, or nothing.
            mask: ComfyUI's masks, of which the first counts. Shape: [(masks,) height, width].
            prompt: What its region reads, or nothing.
            schedule: The weight over the steps, in place of `weight`, as `read_weight` reads it; or nothing.

        Raises:
            ValueError: For a box and a mask, a box or schedule that is none, or an empty mask.
        """
        region: Region | None = _box(box) if box.strip() else None
        if mask is not None:
            if region is not None:
                raise ValueError(f"{path.name} has a box and a mask; clear the box, or disconnect the mask")
            region = mask.reshape(-1, *mask.shape[-2:])[0].detach().float().cpu()
            if not region.any():
                raise ValueError(f"the mask of {path.name} is empty; paint where the concept is meant")
        try:
            over_steps = read_weight(schedule) if schedule.strip() else weight
        except ValueError as error:
            raise ValueError(f"the schedule of {path.name}: {error}") from error
        given = {"trigger": trigger, "class_word": class_word, "prompt": prompt}
        words: dict[str, Any] = {name: said.strip() for name, said in given.items() if said.strip()}
        return cls(path, SceneConcept(name=path.name, weight=over_steps, any_weight=True, **words), region)

    @property
    def weight(self) -> WeightSchedule:
        """Its weight in every step."""
        return WeightSchedule.of(1.0 if self.scene.weight is None else self.scene.weight)


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
    """Regions as masks; white for concepts without one. Shape: [concepts, height, width]."""
    return torch.stack([on_grid(concept.region, (_SIDE, _SIDE)) for concept in concepts])


def subjects_of(concepts: Sequence[Concept]) -> Mapping[int, SceneConcept]:
    """The concepts that are no styles, as our pipelines know them, with the index of each."""
    subjects = [bool(one.scene.phrase or one.scene.prompt) or one.region is not None for one in concepts]
    return {i: one.scene for i, one in enumerate(concepts) if subjects[i]}


def texts_about(concepts: Sequence[SceneConcept], text: Emphasis) -> Sequence[str]:
    """A text about each of some subjects. Raises ValueError if none can be made."""
    if unnamed := _unnamed(concepts, text.text):
        raise ValueError(
            f"no text can be made about {', '.join(unnamed)}: write its trigger in the text, or give it a prompt"
        )
    return [one.prompt or derived(about(one, text.text, concepts), text) for one in concepts]


def _unnamed(concepts: Sequence[SceneConcept], text: str) -> list[str]:
    """Concepts of which no text can be made: their words are not in the text."""
    return [one.name for one in concepts if not (one.prompt or find_words(one.trigger or one.class_word or "", text))]


@dataclass(frozen=True, eq=False)
class Request:
    """What a Compose node is asked for.

    Attributes:
        concepts: The concepts.
        loras: Their factors.
        clip: ComfyUI's CLIP, whose tokenizer finds words.
        encode: Encodes texts.
        text: The text.
        texts: What the cells of a region read: "shared", the text; "regions", one of its own; or "auto".
        joint: Whether the model has text and image in one sequence.
    """

    concepts: Sequence[Concept]
    loras: Sequence[Lora]
    clip: Any
    encode: Encode
    text: str
    texts: str = "auto"
    joint: bool = False

    @cached_property
    def _read(self) -> Emphasis:
        """The text without the signs of weights, and its weights."""
        return read_weights(self.text)

    @cached_property
    def _scenes(self) -> Sequence[SceneConcept]:
        return [one.scene for one in self.concepts]

    @cached_property
    def _subjects(self) -> Mapping[int, SceneConcept]:
        return subjects_of(self.concepts)

    def composed(self, method: str) -> tuple[Composition, Conditioning]:
        """What the concepts do in a model by a method, and the conditioning for it.

        Args:
            method: "draft", "regional", "tara" or "merge"; or "auto", which chooses one, and logs why.

        Raises:
            ValueError: If the method needs regions or words that are not there, or has no use for some that are.
        """
        concepts, regions = self.concepts, [one.region for one in self.concepts]
        if method == "auto":
            method, reason = self._chosen()
            blends = method == "merge" and len(self._subjects) > 1
            logger.log(logging.WARNING if blends else logging.INFO, "method: %s, because %s", method, reason)
        constant = [one.weight.constant for one in concepts]
        schedules = {i: concepts[i].weight for i, weight in enumerate(constant) if weight is None}
        weights = torch.tensor([1.0 if weight is None else weight for weight in constant])
        plan = Composition(self.loras, weights, regions, torch.ones(1, len(concepts)), schedules=schedules)
        if method in ("draft", "regional"):
            return self._draft(plan) if method == "draft" else self._regional(plan)
        if any(region is not None for region in regions):
            raise ValueError(f"{method} does not use boxes and masks; take them away, or choose regional")
        if self.texts == "regions" or any(one.prompt for one in self._scenes):
            raise ValueError(f"{method} reads one text; clear the prompts of concepts, or choose regional")
        if method == "merge":
            plan = replace(plan, text_of_others=True, image_of_others=True)
            return plan, self.encode(self.text, range(len(concepts)))
        return self._tara(replace(plan, image_of_others=True))

    def _chosen(self) -> tuple[str, str]:
        """The method that our pipelines would choose, and the reason."""
        subjects, text = [*self._subjects.values()], self._read.text
        lacking = ", ".join(one.name for one in subjects if not own_nouns(one, text, subjects))
        deciding = [self.concepts[i] for i in self._subjects] or self.concepts
        return method_for(
            [(one.name, self.concepts[i].region is not None) for i, one in self._subjects.items()],
            styles=len(subjects) < len(self.concepts), several=len(subjects) > 1, region_attention=not self.joint,
            lacks=f"the text has no trigger followed by its class word for {lacking}" if lacking else "",
            trained=all(one.scene.trigger and trained_with(one.path) == "tara" for one in deciding),
        )  # fmt: skip

    def _tara(self, plan: Composition) -> tuple[Composition, Conditioning]:
        conditioning = self.encode(self.text, ())
        words = torch.zeros(tokens_of(*conditioning[0]), len(self.concepts))
        for n, one in self._subjects.items():
            if not one.trigger:
                raise ValueError(f"tara needs a trigger for {one.name}: type it in its Concept node")
            try:
                positions = find_tokens(self.clip, self.text, one.trigger, len(words))
            except ValueError as error:
                raise ValueError(f"{one.name}: {error}: {one.phrase!r}") from error
            if words[positions].any():
                raise ValueError(f"the trigger {one.trigger!r} shares words with another one; each needs its own")
            words[positions, n] = 1
        words[:, self._others([*self._subjects])] = 1
        return replace(plan, words=words, tokens=len(words)), conditioning

    def _regional(self, plan: Composition) -> tuple[Composition, Conditioning]:
        owners = [i for i, concept in enumerate(self.concepts) if concept.region is not None]
        if not owners:
            raise ValueError("regional needs to know where concepts are: give at least one a box or a mask")
        for i in self._others(owners):
            if (one := self._scenes[i]).prompt:
                raise ValueError(f"{one.name} has a prompt, and no region that reads it; give it a box or a mask")
        unnamed = _unnamed([self._scenes[i] for i in owners], self._read.text)
        if self.texts == "auto" and self.joint and unnamed:
            logger.warning("all regions read one text, since none can be made about %s", ", ".join(unnamed))
        if self._by_regions(self.joint and not unnamed):
            return self._with_texts(plan, owners)
        return plan, self._shared(owners)

    def _draft(self, plan: Composition) -> tuple[Composition, Conditioning]:
        subjects = self._subjects
        if len(subjects) < 2:
            raise ValueError("draft divides the image between subjects: give two or more a trigger and a class word")
        searched = [i for i in subjects if self.concepts[i].region is None]
        for i in searched:
            if not subjects[i].class_word:
                raise ValueError(f"draft looks for the class word of {subjects[i].name}: type it in its Concept node")
        classes = [(one.class_word or "").lower() for one in subjects.values()]
        by_regions = self._by_regions(len({*classes}) < len(classes))
        if by_regions:
            plan, conditioning = self._with_texts(plan, [*subjects])
            plan = replace(plan, isolate=not self.joint)  # it tears the images of transformers apart
        else:
            conditioning = self._shared([*subjects])
            plan = replace(plan, tokens=tokens_of(*conditioning[0]))
            if not self.joint:
                plan = replace(plan, phrases=self._phrases(subjects, tokens_of(*conditioning[0])))
        if not searched:
            return plan, conditioning
        plain = derived(without_triggers(self._read.text, [*subjects.values()]), self._read)
        of_draft = self._once(plain, self._others([*subjects]))
        words = torch.zeros(tokens_of(*of_draft[0]), len(subjects))
        for n, i in enumerate(subjects):
            if i in searched:
                positions = find_tokens(self.clip, plain, subjects[i].class_word or "", len(words))
                words[positions, n] = 1 / len(positions)
        return replace(plan, draft=Draft(of_draft, words, subjects, by_regions)), conditioning

    def _others(self, owners: Sequence[int]) -> Sequence[int]:
        """The concepts that act everywhere, beside those that have a region."""
        return [i for i in range(len(self.concepts)) if i not in owners]

    def _by_regions(self, auto: bool) -> bool:
        """Whether regions read texts of their own.

        Args:
            auto: Whether "auto" means that where no concept has a prompt.
        """
        if self.texts != "auto":
            return self.texts == "regions"
        return auto or any(one.prompt for one in self._scenes)

    def _shared(self, owners: Sequence[int]) -> Conditioning:
        """The conditioning of one text for all regions."""
        for one in self._scenes:
            if one.prompt:
                raise ValueError(
                    f"{one.name} has a prompt, and all regions read one text; clear it, or set texts to regions"
                )
        return self.encode(self.text, self._others(owners))

    def _with_texts(self, plan: Composition, owners: Sequence[int]) -> tuple[Composition, Conditioning]:
        """A text for the image, and one for each region; and the conditioning of the whole text, without triggers."""
        mine, styles, read = [self._scenes[i] for i in owners], self._others(owners), self._read
        texts, plain = texts_about(mine, read), without_triggers(read.text, mine)
        others = [one for i in styles if (one := self._scenes[i]).trigger]
        # On UNets, cells outside of regions read of the surroundings alone, as in our pipelines.
        first = plain if self.joint else surroundings(read.text, mine, others)
        every = [self._once(derived(first, read), styles)]
        every += [self._once(own, [*styles, i]) for i, own in zip(owners, texts, strict=True)]
        everywhere = torch.tensor([float(i in styles) for i in range(len(self.concepts))])
        words = torch.stack([everywhere, *(everywhere + torch.eye(len(everywhere))[list(owners)])])
        # It is also what describes the image as a whole.
        whole = every[0] if first == plain else self._once(derived(plain, read), styles)
        return replace(plan, words=words, texts=every, owners=owners, tokens=tokens_of(*whole[0])), whole

    def _once(self, text: str, which: Sequence[int]) -> Conditioning:
        found = self.encode(text, which)
        if len(found) != 1:
            raise ValueError("the CLIP has LoRA hooks with a schedule; leave them out with draft and texts of regions")
        return found

    def _phrases(self, subjects: Mapping[int, SceneConcept], tokens: int) -> Tensor:
        """1 at the tokens from a trigger to its class word, or of the class word alone. Shape: [tokens, concepts]."""
        phrases, text = torch.zeros(tokens, len(self.concepts)), self._read.text
        for i, one in subjects.items():
            said = {text[slice(*span)] for span in named_spans(one, text, [*subjects.values()])}
            for words in said or {one.class_word or ""} - {""}:
                phrases[find_tokens(self.clip, self.text, words, tokens), i] = 1
        return phrases
