"""Ideogram 4's prompts in JSON, into which the boxes of concepts are written: one scene gives layout and gates.

The model was trained on captions of this form; `bbox` of an element is [top, left, bottom, right] in thousandths of the
image, as four tools have it that cite docs/prompting.md of github.com/ideogram-oss/ideogram4. To diffusers they are
texts like any other.
"""

import json
from collections.abc import Sequence
from typing import Any

from lora_compose.pipelines.scene.mask_images import Box, is_fractions
from lora_compose.pipelines.scene.scene import Concept
from lora_compose.pipelines.support.spelling import shortened
from lora_compose.pipelines.text.prompts import about
from lora_compose.pipelines.text.tokens import find_words

_PARTS, _ELEMENTS = "compositional_deconstruction", "elements"


def with_boxes(prompt: str, concepts: Sequence[Concept], width: int, height: int) -> str:
    """A caption in JSON with the boxes of concepts.

    Args:
        prompt: A caption, of which the first element that names a concept gets its box; or plain text, which becomes
            the description of a caption without a background. A concept that no element names gets one.
        concepts: Concepts with a box.
        width: Of the image, in pixels.
        height: As `width`.

    Raises:
        ValueError: If the prompt begins like JSON, and is no caption, or a concept has no words.
    """
    caption = _caption(prompt)
    elements: list[dict[str, Any]] = caption[_PARTS][_ELEMENTS]
    for concept in concepts:
        box = {"bbox": _thousandths(concept.region, width, height)}
        index = _element_of(concept, elements)
        if index is None:
            description = concept.prompt or concept.phrase
            if not description:
                raise ValueError(
                    f"there is nothing to write about {concept.name!r}; give it a trigger, a class_word or a prompt"
                )
            elements.append({"type": "obj", **box, "desc": description})
        else:
            rest = {name: value for name, value in elements[index].items() if name not in ("type", "bbox")}
            elements[index] = {"type": elements[index].get("type", "obj"), **box, **rest}
    return json.dumps(caption, separators=(",", ":"), ensure_ascii=False)


def text_of(concept: Concept, prompt: str, concepts: Sequence[Concept]) -> str:
    """What a prompt says about one concept: its element in a caption, or `about`. ValueError if it says nothing."""
    if concept.prompt is None and _is_json(prompt):
        elements = _caption(prompt)[_PARTS][_ELEMENTS]
        index = _element_of(concept, elements)
        return concept.phrase if index is None else elements[index]["desc"]
    return about(concept, prompt, concepts)


def _is_json(prompt: str) -> bool:
    return prompt.lstrip().startswith("{")


def _caption(prompt: str) -> dict[str, Any]:
    if not _is_json(prompt):
        return {"high_level_description": prompt, _PARTS: {"background": "", _ELEMENTS: []}}
    try:
        caption: Any = json.loads(prompt)
        if all(isinstance(element["desc"], str) for element in caption[_PARTS][_ELEMENTS]):
            return caption
    except (ValueError, TypeError, KeyError):
        pass
    raise ValueError(
        f'the prompt {shortened(prompt)} is no caption in JSON; expected {{"{_PARTS}": {{"background": "...", '
        f'"{_ELEMENTS}": [{{"type": "obj", "desc": "..."}}]}}}}, or plain text'
    )


def _element_of(concept: Concept, elements: Sequence[dict[str, Any]]) -> int | None:
    word = concept.trigger or concept.class_word or ""
    return next((i for i, element in enumerate(elements) if find_words(word, element["desc"])), None)


def _thousandths(region: Any, width: int, height: int) -> list[int]:
    box: Box = region
    scales = (1, 1) if is_fractions(box) else (width, height)
    left, top, right, bottom = (
        min(1000, round(1000 * side / scale)) for side, scale in zip(box, scales * 2, strict=True)
    )
    return [top, left, bottom, right]
