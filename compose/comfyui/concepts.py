"""Concepts as people give them in nodes, and the composition that a method makes of them."""

import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_compose.attention import Lora
from lora_compose.attention.masks import Box
from lora_compose.compose.comfyui.composition import UNIT, ComposedConcepts, Conditioning, DraftSteps, Region, on_grids
from lora_compose.compose.comfyui.tokens import find_tokens, tokens_of
from lora_compose.compose.comfyui.weights import read_weights, written
from lora_compose.pipelines.formats.files import trained_with
from lora_compose.pipelines.scene.division import APART_JOINT
from lora_compose.pipelines.scene.method_choice import method_for
from lora_compose.pipelines.scene.scene import Concept, beside_its_class
from lora_compose.pipelines.scene.strength import WeightSchedule, read_weight
from lora_compose.pipelines.text.emphasis import Weighted
from lora_compose.pipelines.text.prompts import about, named_spans, surroundings, without_triggers
from lora_compose.pipelines.text.tokens import find_words, free_nouns, own_nouns

logger = logging.getLogger("lora_compose")
Encode = Callable[[str, Sequence[int]], Conditioning]
"""Encodes a text with the text-encoder LoRAs of some concepts."""

Phrases = Mapping[str, Collection[int] | None]
"""Words in a text, with the indices of those of their occurrences that are meant; None is all."""

_WRITE = "write it where the subject without a LoRA is meant"
_SIDE = 256
"""Rows and columns of a region that is shown as a mask."""


@dataclass(frozen=True, eq=False)
class NodeConcept:
    """One LoRA, or a subject without one (a bystander), as given.

    Attributes:
        path: The LoRA; None for a bystander.
        scene: Its words and weight, as our pipelines know them; its name is that of the file, or the class word of a
            bystander, whose weight is 0; with a number where an earlier concept has that (`chained`).
        region: Where it acts; None is everywhere, or where a draft finds it.
    """

    path: Path | None
    scene: Concept
    region: Region | None = None

    @classmethod
    def of(
        cls, path: Path | None, trigger: str, class_word: str, weight: float, box: str = "",
        mask: Tensor | None = None, prompt: str = "", schedule: str = "",
    ) -> "NodeConcept":  # fmt: skip
        """A concept of what a node has.

        Args:
            path: The LoRA; None for a bystander.
            trigger: The trigger, if it has one.
            class_word: The noun after it; that of a bystander follows no trigger.
            weight: Factor on the LoRA.
            box: left,top,right,bottom as fractions of the image, or nothing.
            mask: ComfyUI's masks, of which the first counts. Shape: [(masks,) height, width].
            prompt: What its region reads, or nothing.
            schedule: The weight over the steps, in place of `weight`, as `read_weight` reads it; or nothing.

        Raises:
            ValueError: For a box and a mask, a box or schedule that is none, or an empty mask; for a bystander without
                a class word, or with what only a LoRA has.
        """
        name, region = _without_lora(trigger, class_word, weight, schedule) if path is None else path.name, _box(box)
        if mask is not None:
            if region is not None:
                raise ValueError(f"{name} has a box and a mask; clear the box, or disconnect the mask")
            region = mask.reshape(-1, *mask.shape[-2:])[0].detach().float().cpu()
            if not region.any():
                raise ValueError(f"the mask of {name} is empty; paint where the concept is meant")
        try:
            over_steps = read_weight(schedule) if schedule.strip() else weight
        except ValueError as error:
            raise ValueError(f"the schedule of {name}: {error}") from error
        given = {"trigger": trigger, "class_word": class_word, "prompt": prompt}
        words: dict[str, Any] = {name: said.strip() for name, said in given.items() if said.strip()}
        if path is None:
            return cls(path, Concept(name=name, role="bystander", weight=0.0, **words), region)
        return cls(path, Concept(name=name, weight=over_steps, any_weight=True, **words), region)

    @property
    def weight(self) -> WeightSchedule:
        """The concept's weight in every step."""
        return WeightSchedule.of(1.0 if self.scene.weight is None else self.scene.weight)


def chained(before: Sequence[NodeConcept], concept: NodeConcept) -> Sequence[NodeConcept]:
    """A chain with one more concept, whose name gets a number if it is there already: words are shared out by name."""
    names, name = {other.scene.name for other in before}, concept.scene.name
    free = next(called for called in chain([name], (f"{name} ({n})" for n in count(2))) if called not in names)
    return *before, replace(concept, scene=concept.scene.model_copy(update={"name": free}))


def _without_lora(trigger: str, class_word: str, weight: float, schedule: str) -> str:
    """The name of a bystander. Raises ValueError if it has no class word, or what only a LoRA has."""
    noun = class_word.strip()
    if trigger.strip():
        raise ValueError(
            f"the Concept with the trigger {trigger.strip()!r} has no LoRA: choose its file, or clear the trigger; a "
            "subject without a LoRA has a class word alone"
        )
    if not noun:
        raise ValueError(
            "a Concept has neither a LoRA nor a class word: choose a file, or type what the subject without a LoRA is, "
            "for example cat"
        )
    if schedule.strip() or weight != 1:
        wrong, right = ("a schedule", "clear it") if schedule.strip() else ("a weight", "set it to 1")
        raise ValueError(
            f"the subject {noun!r} has {wrong}, but no LoRA that it would change: {right}, or choose a file"
        )
    return noun


def _box(text: str) -> Box | None:
    """The box in a text; None for an empty one, and for "none"."""
    if text.strip().lower() in ("", "none"):
        return None
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
    """The boxes in a text, one a line; "none" is one that acts everywhere. Raises ValueError as `NodeConcept.of`."""
    return [_box(line) for line in text.splitlines() if line.strip()]


def with_boxes(concepts: Sequence[NodeConcept], boxes: Sequence[Box | None]) -> Sequence[NodeConcept]:
    """Concepts with boxes, in their order. Raises ValueError if there are not as many, or a concept has a region."""
    if len(boxes) != len(concepts):
        raise ValueError(
            f"there are {len(boxes)} boxes for {len(concepts)} concepts; write one a line, and none for a concept that "
            "acts everywhere"
        )
    for concept in concepts:
        if concept.region is not None:
            raise ValueError(f"{concept.scene.name} has a box or a mask in its Concept node already; clear it there")
    return tuple(replace(concept, region=box) for concept, box in zip(concepts, boxes, strict=True))


def with_masks(concepts: Sequence[NodeConcept], masks: Tensor) -> Sequence[NodeConcept]:
    """Concepts whose subjects have masks as regions, in the order of all. ValueError if there are not as many.

    Shape: [concepts, height, width].
    """
    if len(masks) != len(concepts):
        raise ValueError(f"there are {len(masks)} masks for {len(concepts)} concepts; connect one for each")
    placed = {i: replace(concepts[i], region=masks[i].detach().float().cpu()) for i in subjects_of(concepts)}
    return [placed.get(i, concept) for i, concept in enumerate(concepts)]


def drawn(concepts: Sequence[NodeConcept]) -> Tensor:
    """Regions as masks; white for concepts without one. Shape: [concepts, height, width]."""
    return on_grids([concept.region for concept in concepts], (_SIDE, _SIDE))


def subjects_of(concepts: Sequence[NodeConcept]) -> Mapping[int, Concept]:
    """The concepts that are no styles, as our pipelines know them, with the index of each."""
    return {
        i: concept.scene
        for i, concept in enumerate(concepts)
        if concept.scene.phrase or concept.scene.prompt or concept.region is not None
    }


def texts_about(concepts: Sequence[Concept], text: Weighted, named: Sequence[Concept] | None = None) -> Sequence[str]:
    """A text about each of some subjects; it may name `named`, by default these. ValueError if none can be made."""
    every = concepts if named is None else named
    if unnamed := _unnamed(concepts, text.text, every):
        trained = [concept.name for concept in unnamed if not concept.is_bystander]
        names = ", ".join(trained or [concept.name for concept in unnamed])
        write = "write its trigger in the text" if trained else f"{_lacking(unnamed)}; {_WRITE}"
        raise ValueError(f"no text can be made about {names}: {write}, or give it a prompt")
    return [concept.prompt or written(about(concept, text, every)) for concept in concepts]


def _unnamed(concepts: Sequence[Concept], text: str, named: Sequence[Concept]) -> Sequence[Concept]:
    """The concepts of which no text can be made, since their words are not in the text."""
    without = [concept for concept in concepts if not concept.prompt]
    return [concept for concept in without if not _is_named(concept, text, named)]


def _is_named(concept: Concept, text: str, named: Sequence[Concept]) -> bool:
    if concept.is_bystander:
        return bool(own_nouns(concept, text, named))
    return bool(find_words(concept.trigger or concept.class_word or "", text, concept.class_word))


def _lacking(subjects: Sequence[Concept]) -> str:
    """What a text lacks that does not name some subjects by their words; empty if there are none."""
    trained = ", ".join(subject.name for subject in subjects if not subject.is_bystander)
    others = [f"no {subject.class_word!r} that follows no trigger" for subject in subjects if subject.is_bystander]
    lacking = [f"no trigger followed by its class word for {trained}", *others] if trained else others
    return f"the text has {', and '.join(lacking)}" if lacking else ""


def _trained_with_tara(concept: NodeConcept) -> bool:
    """Whether a concept has a trigger and a LoRA that was trained with token masks."""
    return concept.path is not None and bool(concept.scene.trigger) and trained_with(concept.path) == "tara"


@dataclass(frozen=True, eq=False)
class ComposeRequest:
    """What a Compose node is asked for.

    Attributes:
        loras: Their factors; none for a bystander.
        clip: ComfyUI's CLIP, whose tokenizer finds words.
        encode: Encodes texts.
        texts: What the cells of a region read: "shared", the text; "regions", one of its own; or "auto".
        joint: Whether the model has text and image in one sequence.
    """

    concepts: Sequence[NodeConcept]
    loras: Sequence[Lora]
    clip: Any
    encode: Encode
    text: str
    texts: str = "auto"
    joint: bool = False

    @cached_property
    def _read(self) -> Weighted:
        """The text without the signs of weights, and its weights."""
        return read_weights(self.text)

    @cached_property
    def _prompted(self) -> Mapping[int, str]:
        """The names of the concepts with a prompt, by index."""
        return {i: concept.scene.name for i, concept in enumerate(self.concepts) if concept.scene.prompt}

    @cached_property
    def _subjects(self) -> Mapping[int, Concept]:
        return subjects_of(self.concepts)

    @property
    def _trained(self) -> Mapping[int, Concept]:
        """The subjects that have a LoRA."""
        return {i: subject for i, subject in self._subjects.items() if not subject.is_bystander}

    def composed(self, method: str) -> tuple[ComposedConcepts, Conditioning]:
        """What the concepts do in a model by a method, and the conditioning for it.

        Args:
            method: "draft", "regional", "tara" or "merge"; or "auto", which chooses one, and logs why.

        Raises:
            ValueError: If the method needs regions or words that are not there, or has no use for some that are.
        """
        if method == "auto":
            method, reason = self._chosen()
            blends = method == "merge" and len(self._subjects) > 1
            logger.log(logging.WARNING if blends else logging.INFO, "method: %s, because %s", method, reason)
        regions, weights = [concept.region for concept in self.concepts], [concept.weight for concept in self.concepts]
        composition = ComposedConcepts(self.loras, weights, regions, torch.ones(1, len(weights)))
        if method in ("draft", "regional"):
            return self._draft(composition) if method == "draft" else self._regional(composition)
        if any(region is not None for region in regions):
            raise ValueError(f"{method} does not use boxes and masks; take them away, or choose regional")
        if self.texts == "regions" or self._prompted:
            raise ValueError(f"{method} reads one text; clear the prompts of concepts, or choose regional")
        if method == "merge":
            composition = replace(composition, text_of_others=True, image_of_others=True)
            return composition, self.encode(self.text, range(len(weights)))
        return self._tara(replace(composition, image_of_others=True))

    def _chosen(self) -> tuple[str, str]:
        """The method that our pipelines would choose, and the reason."""
        subjects, text = [*self._subjects.values()], self._read.text
        lacking = [subject for subject in subjects if not own_nouns(subject, text, subjects)]
        deciding = [self.concepts[i] for i in self._trained] or self.concepts
        return method_for(
            [(subject.name, self.concepts[i].region is not None) for i, subject in self._subjects.items()],
            styles=len(subjects) < len(self.concepts), several=len(subjects) > 1,
            lacks=_lacking(lacking), trained=all(map(_trained_with_tara, deciding)),
        )  # fmt: skip

    def _tara(self, composition: ComposedConcepts) -> tuple[ComposedConcepts, Conditioning]:
        trained = self._trained
        if nameless := [subject.name for subject in trained.values() if not subject.trigger]:
            raise ValueError(f"tara needs a trigger for {', '.join(nameless)}: type it in its Concept node")
        conditioning = self.encode(self.text, ())
        triggers = {i: {subject.trigger or "": None} for i, subject in trained.items()}
        words = self._at(self.text, triggers, tokens_of(*conditioning[0]))
        if (shared := words.sum(dim=1) > 1).any():
            names = [self.concepts[i].scene.name for i in words[shared].any(dim=0).nonzero()[:, 0].tolist()]
            raise ValueError(f"the triggers of {' and '.join(names)} share words; each needs its own")
        words[:, self._others([*triggers])] = 1
        return replace(composition, words=words, tokens=len(words)), conditioning

    def _regional(self, composition: ComposedConcepts) -> tuple[ComposedConcepts, Conditioning]:
        owners = [i for i, concept in enumerate(self.concepts) if concept.region is not None]
        if not owners:
            raise ValueError("regional needs to know where concepts are: give at least one a box or a mask")
        if unread := [name for i, name in self._prompted.items() if i not in owners]:
            raise ValueError(f"{unread[0]} has a prompt, and no region that reads it; give it a box or a mask")
        scenes = [self.concepts[i].scene for i in owners]
        everywhere = [subject.name for i, subject in self._trained.items() if i not in owners]
        if everywhere and any(concept.is_bystander for concept in scenes):
            names = ", ".join(everywhere)
            logger.warning("without a box or mask, %s acts on the whole image, also in the regions of others", names)
        composition, conditioning = self._in_regions(composition, owners, auto=False)
        if not self.joint:
            return composition, conditioning
        composition = replace(composition, owners=owners, isolate=APART_JOINT if len(owners) > 1 else 0.0)
        if not composition.texts:
            tokens, subjects, text = tokens_of(*conditioning[0]), self._subjects, self._read.text
            named = {i: each for i, each in subjects.items() if _is_named(each, text, [*subjects.values()])}
            if (kept := self._of_others(self._phrases(named, tokens))).any():
                composition = replace(composition, tokens=tokens, kept=kept)
        return composition, conditioning

    def _draft(self, composition: ComposedConcepts) -> tuple[ComposedConcepts, Conditioning]:
        subjects = self._subjects
        if len(subjects) < 2:
            raise ValueError("draft divides the image between subjects: give two or more a trigger and a class word")
        searched = {i: subject for i, subject in subjects.items() if self.concepts[i].region is None}
        for subject in searched.values():
            if not subject.class_word:
                raise ValueError(f"draft looks for the class word of {subject.name}: type it in its Concept node")
        apart = beside_its_class([*subjects.values()]) and not self.joint
        composition, conditioning = self._in_regions(composition, [*subjects], auto=apart)
        isolate = APART_JOINT if self.joint else float(bool(composition.texts))
        composition = replace(composition, owners=[*subjects], isolate=isolate)
        if not composition.texts:
            tokens = tokens_of(*conditioning[0])
            phrases = self._phrases(subjects, tokens)
            kept = self._of_others(phrases) if self.joint else None
            composition = replace(composition, tokens=tokens, phrases=phrases, kept=kept)
        if not searched:
            return composition, conditioning
        bare = without_triggers(self._read, [*subjects.values()])
        plain = written(bare)
        of_draft = self._once(plain, self._others([*subjects]))
        nouns = {i: {subject.class_word or "": self._own(subject, bare)} for i, subject in searched.items()}
        words = self._at(plain, nouns, tokens_of(*of_draft[0]))
        in_strips = bool(composition.texts) and not self.joint
        draft = DraftSteps(of_draft, words / words.sum(dim=0).clamp(min=1), subjects, in_strips)
        return replace(composition, draft=draft), conditioning

    def _of_others(self, phrases: Tensor) -> Tensor:
        """1 at the words of other subjects, for each subject; 0 for styles. Shape of both: [tokens, concepts]."""
        subjects, kept = [*self._subjects], torch.zeros_like(phrases)
        kept[:, subjects] = (phrases.sum(dim=1, keepdim=True) - phrases)[:, subjects].clamp(max=1)
        return kept

    def _others(self, owners: Sequence[int]) -> Sequence[int]:
        """The concepts that act everywhere, beside those that have a region."""
        return [i for i in range(len(self.concepts)) if i not in owners]

    def _in_regions(
        self, composition: ComposedConcepts, owners: Sequence[int], *, auto: bool
    ) -> tuple[ComposedConcepts, Conditioning]:
        """Concepts whose regions read texts of their own, or all one; `auto`: own texts where none has a prompt."""
        if self.texts == "regions" or (self.texts == "auto" and (auto or self._prompted)):
            return self._with_texts(composition, owners)
        if self._prompted:
            name = next(iter(self._prompted.values()))
            raise ValueError(f"{name} has a prompt, and all regions read one text; clear it, or set texts to regions")
        return composition, self.encode(self.text, self._others(owners))

    def _with_texts(
        self, composition: ComposedConcepts, owners: Sequence[int]
    ) -> tuple[ComposedConcepts, Conditioning]:
        """A text for the image, and one for each region; and the conditioning of the whole text, without triggers."""
        scenes, styles, read = [concept.scene for concept in self.concepts], self._others(owners), self._read
        mine, others = [scenes[i] for i in owners], [scenes[i] for i in styles if scenes[i].trigger]
        texts, plain = texts_about(mine, read), without_triggers(read, mine)
        # On UNets, cells outside of regions read of the surroundings alone, as in our pipelines.
        first = plain if self.joint else surroundings(read, mine, others)
        every = [self._once(written(first), styles)]
        every += [self._once(own, [*styles, i]) for i, own in zip(owners, texts, strict=True)]
        everywhere = torch.tensor([float(i in styles) for i in range(len(scenes))])
        words = torch.stack([everywhere, *(everywhere + torch.eye(len(scenes))[list(owners)])])
        # It is also what describes the image as a whole.
        whole = every[0] if first == plain else self._once(written(plain), styles)
        tokens = tokens_of(*whole[0])
        return replace(composition, words=words, texts=every, whole=whole, owners=owners, tokens=tokens), whole

    def _once(self, text: str, which: Sequence[int]) -> Conditioning:
        conditioning = self.encode(text, which)
        if len(conditioning) != 1:
            raise ValueError("the CLIP has LoRA hooks with a schedule; leave them out with draft and texts of regions")
        return conditioning

    def _phrases(self, subjects: Mapping[int, Concept], tokens: int) -> Tensor:
        """1 at the tokens from a trigger to its class word, or of the class word alone. Shape: [tokens, concepts]."""
        text, every = self._read.text, [*self._subjects.values()]
        phrases: dict[int, Phrases] = {}
        for i, subject in subjects.items():
            noun = subject.class_word or ""
            spans = [] if subject.is_bystander else named_spans(subject, text, every)
            phrases[i] = {text[slice(*span)]: None for span in spans} or {noun: self._own(subject, text)}
        return self._at(self.text, phrases, tokens)

    def _own(self, subject: Concept, text: str) -> Collection[int] | None:
        """The occurrences of a class word that a subject means; None is all. ValueError for an unnamed bystander."""
        subjects, whole = [*self._subjects.values()], self._read.text
        own, free = own_nouns(subject, whole, subjects), free_nouns(subject, text, subjects)
        if subject.is_bystander and not own:
            raise ValueError(f"{_lacking([subject])}; {_WRITE}")
        if not own or len(free) != len(free_nouns(subject, whole, subjects)):
            return None
        places = find_words(subject.class_word or "", text)
        return [places.index(free[k]) for k in own]

    def _at(self, text: str, words: Mapping[int, Phrases], tokens: int) -> Tensor:
        """1 at the tokens of some words of each concept. Shape: [tokens, concepts]."""
        gate = torch.zeros(tokens, len(self.concepts))
        for i, phrases in words.items():
            for phrase, which in phrases.items():
                if not phrase:
                    continue
                scene = self.concepts[i].scene
                try:
                    gate[find_tokens(self.clip, text, phrase, tokens, which, scene.class_word), i] = 1
                except ValueError as error:
                    raise ValueError(f"{scene.name}: {error}: {scene.phrase!r}") from error
        return gate
