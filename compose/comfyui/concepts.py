"""Concepts as people give them in nodes, and the composition that a method makes of them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_compose.attention import Lora
from lora_compose.attention.masks import Box, box_mask
from lora_compose.compose.comfyui.composition import UNIT, Composition, Region
from lora_compose.compose.comfyui.tokens import find_tokens

_SIDE = 256
"""Rows and columns of a box that is shown as a mask."""


@dataclass(frozen=True, eq=False)
class Concept:
    """One LoRA, as given. The region is None for one that acts everywhere."""

    path: Path
    trigger: str
    class_word: str
    weight: float
    region: Region | None

    @classmethod
    def of(
        cls, path: Path, trigger: str, class_word: str, weight: float, box: str = "", mask: Tensor | None = None
    ) -> "Concept":
        """A concept of what a node has.

        Args:
            path: The LoRA.
            trigger: The trigger, if it has one.
            class_word: The noun after it.
            weight: Factor on the LoRA.
            box: left,top,right,bottom as fractions of the image, or nothing.
            mask: ComfyUI's masks, of which the first counts. Shape: [(masks,) height, width].

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
        return cls(path, trigger.strip(), class_word.strip(), weight, region)

    @property
    def phrase(self) -> str:
        """Trigger and class word, as they are written in a text."""
        return f"{self.trigger} {self.class_word}".strip()


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


def drawn(concepts: Sequence[Concept]) -> Tensor:
    """Boxes as masks; those of concepts without one are white. Shape: [concepts, height, width]."""
    size = (_SIDE, _SIDE)
    boxes = [(0, 0, UNIT, UNIT) if concept.region is None else concept.region for concept in concepts]
    return torch.stack([box_mask(box, (UNIT, UNIT), size) for box in boxes if isinstance(box, tuple)])


def composition_of(
    concepts: Sequence[Concept], loras: Sequence[Lora], clip: Any, text: str, method: str
) -> Composition:
    """What concepts do in a model by a method.

    Args:
        concepts: The concepts.
        loras: Their factors.
        clip: ComfyUI's CLIP, whose tokenizer finds the triggers.
        text: The text that is encoded.
        method: "regional", "tara" or "merge".

    Raises:
        ValueError: If the method needs regions or triggers that are not there, or has no use for regions.
    """
    weights = torch.tensor([concept.weight for concept in concepts])
    regions, ones = [concept.region for concept in concepts], torch.ones(1, len(concepts))
    if method == "regional":
        if all(region is None for region in regions):
            raise ValueError("regional needs to know where concepts are: give at least one a box or a mask")
        return Composition(loras, weights, regions, ones, text_of_others=False, image_of_others=False)
    if any(region is not None for region in regions):
        raise ValueError(f"{method} does not use boxes and masks; take them away, or choose regional")
    if method == "merge":
        return Composition(loras, weights, regions, ones, text_of_others=True, image_of_others=True)
    found = [_trigger(clip, text, concept) for concept in concepts]
    words = torch.zeros(found[0][1], len(concepts))
    for n, (positions, _) in enumerate(found):
        if words[list(positions)].any():
            raise ValueError(f"the trigger {concepts[n].trigger!r} shares words with another one; each needs its own")
        words[list(positions), n] = 1
    return Composition(loras, weights, regions, words, text_of_others=False, image_of_others=True)


def _trigger(clip: Any, text: str, concept: Concept) -> tuple[Sequence[int], int]:
    if not concept.trigger:
        raise ValueError(f"tara needs a trigger for {concept.path.name}: type it in its Concept node")
    try:
        return find_tokens(clip, text, concept.trigger)
    except ValueError as error:
        raise ValueError(f"{concept.path.name}: {error}: {concept.phrase!r}") from error
