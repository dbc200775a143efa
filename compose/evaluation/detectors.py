"""Detectors that find concepts in an image by nouns."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

from lora_compose.compose.evaluation.confusion import inside
from lora_compose.compose.evaluation.encoders import Encoder
from lora_compose.compose.evaluation.suite import WindowsConfig, ZeroShotConfig
from lora_compose.compose.support.quiet import without_bars
from lora_compose.pipelines.scene.mask_images import Box

SHARED = 0.5  # two boxes of which the smaller one lies in the larger one by more than this are one object


@dataclass(frozen=True)
class Detection:
    """An object that was found: the noun it was found by, its box in pixels, and the detector's confidence, 0 to 1."""

    word: str
    box: Box
    score: float


class Detector(Protocol):
    """Finds objects by nouns."""

    def detect(self, image: Image.Image, words: Sequence[str]) -> list[Detection]:
        """Objects that match any of the words, most confident first; no two of them overlap strongly."""
        ...


class WindowDetector:
    """Classifies square windows of an image with a text-image encoder.

    A window is a finding if "a WORD" fits it better than all of: the same of every other noun, "a part of a WORD" of
    every noun, and "nothing". Windows of three sizes are tried on a coarse grid; around the best ones for every word,
    nearby windows are tried as well. The encoder must know what a part is: this is made for the playground's judge.
    `vocabulary` has further nouns that may be in the image; similarities are divided by `temperature` before the
    softmax.
    """

    def __init__(
        self, encoder: Encoder, vocabulary: Sequence[str] = (), threshold: float = 0.3, temperature: float = 0.04
    ) -> None:
        if not encoder.has_text:
            raise ValueError(
                f"windows need an encoder that reads text, and {encoder.name} does not; use CLIP or SigLIP"
            )
        self._encoder, self._vocabulary = encoder, tuple(vocabulary)
        self._threshold, self._temperature = threshold, temperature

    def detect(self, image: Image.Image, words: Sequence[str]) -> list[Detection]:
        """Objects that match any of the words, most confident first."""
        words = list(dict.fromkeys(words))
        nouns = list(dict.fromkeys([*words, *self._vocabulary]))
        whole = [_article(noun) for noun in nouns]
        texts = self._encoder.texts([*whole, *(f"a part of {noun}" for noun in whole), "nothing"])
        boxes = coarse_windows(image.size)
        shares = self._name(image, boxes, texts, len(words))
        near = [box for word in range(len(words)) for box in _around(boxes, shares[:, word], image.size)]
        near = [box for box in dict.fromkeys(near) if box not in set(boxes)]
        if near:
            boxes, shares = [*boxes, *near], torch.cat([shares, self._name(image, near, texts, len(words))])
        detections = [
            Detection(words[word], box, round(share, 4))
            for box, row in zip(boxes, shares.tolist(), strict=True)
            for word, share in enumerate(row)
            if share >= self._threshold
        ]
        return distinct(detections)

    def _name(self, image: Image.Image, boxes: Sequence[Box], texts: Tensor, words: int) -> Tensor:
        """How well each window is named by the first texts. Shape: [boxes, words]."""
        similarity = self._encoder.images([image.crop(box) for box in boxes]) @ texts.T
        return (similarity / self._temperature).softmax(dim=1)[:, :words]


class ZeroShotDetector:
    """A zero-shot object detection model of transformers, such as OWLv2 or Grounding DINO, from a folder or the hub."""

    def __init__(self, source: str, threshold: float = 0.2, device: str = "cpu") -> None:
        try:
            with without_bars():
                self._processor: Any = AutoProcessor.from_pretrained(source)
                model: Any = AutoModelForZeroShotObjectDetection.from_pretrained(source, use_safetensors=True)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"the detector {source!r} cannot be opened: {str(error)[:400]}") from error
        self._model, self._device = model.to(device).eval(), device
        self._options: dict[str, Any] = {"threshold": threshold}
        # Grounding DINO names an object by the tokens above a threshold of their own, which would leave some without.
        if "text_threshold" in signature(self._processor.post_process_grounded_object_detection).parameters:
            self._options["text_threshold"] = threshold

    @torch.no_grad()
    def detect(self, image: Image.Image, words: Sequence[str]) -> list[Detection]:
        """Objects that match any of the words, most confident first."""
        words = list(dict.fromkeys(words))
        queries = [_article(word) for word in words]
        inputs = self._processor(text=[queries], images=image, return_tensors="pt").to(self._device)
        output = self._model(**inputs)
        (result,) = self._processor.post_process_grounded_object_detection(
            output, target_sizes=[(image.height, image.width)], text_labels=[queries], **self._options
        )
        named = [words[queries.index(it)] if it in queries else word_of(it, words) for it in result["text_labels"]]
        detections = [
            Detection(word, box, round(float(score), 4))
            for word, score, edges in zip(named, result["scores"], result["boxes"], strict=True)
            if word is not None and (box := _clipped(edges.tolist(), image.size)) is not None
        ]
        return distinct(detections)


def make_detector(config: WindowsConfig | ZeroShotConfig, encoder: Encoder, device: str) -> Detector:
    """The detector of a suite."""
    if isinstance(config, WindowsConfig):
        return WindowDetector(encoder, config.vocabulary, config.threshold)
    return ZeroShotDetector(config.model, config.threshold, device)


def coarse_windows(size: tuple[int, int]) -> list[Box]:
    """Squares of three sizes, spread evenly so that the edges of the image are reached."""
    width, height = size
    windows = []
    for share, per_side in ((0.4, 6), (0.5, 5), (0.6, 4)):
        side = round(share * min(width, height))
        across = per_side if width <= height else round(per_side * width / height)
        down = per_side if height <= width else round(per_side * height / width)
        for top in np.linspace(0, height - side, down).round().astype(int).tolist():
            for left in np.linspace(0, width - side, across).round().astype(int).tolist():
                windows.append((left, top, left + side, top + side))
    return windows


def _around(boxes: Sequence[Box], shares: Tensor, size: tuple[int, int]) -> list[Box]:
    """Windows near the two best ones: moved by a sixteenth of the image, or a little larger or smaller."""
    width, height = size
    step = max(1, min(width, height) // 16)
    windows = []
    for i in shares.argsort(descending=True)[:2].tolist():
        left, top, right, bottom = boxes[i]
        for x, y, grow in ((step, 0, 0), (-step, 0, 0), (0, step, 0), (0, -step, 0), (0, 0, step), (0, 0, -step)):
            half = grow // 2
            moved = (left + x - half, top + y - half, right + x + grow - half, bottom + y + grow - half)
            if moved[0] >= 0 and moved[1] >= 0 and moved[2] <= width and moved[3] <= height:
                windows.append(moved)
    return windows


def distinct(detections: Sequence[Detection]) -> list[Detection]:
    """Keeps the most confident of overlapping findings, whatever their words."""
    kept: list[Detection] = []
    for detection in sorted(detections, key=lambda detection: -detection.score):
        if all(shared(detection.box, other.box) <= SHARED for other in kept):
            kept.append(detection)
    return kept


def shared(a: Box, b: Box) -> float:
    """Fraction of the smaller box that lies in the larger one, 0 to 1."""
    return max(inside(a, b), inside(b, a))


def _clipped(edges: Sequence[float], size: tuple[int, int]) -> Box | None:
    """A box in whole pixels that stays in the image; None if nothing of it is there."""
    left, top, right, bottom = (round(edge) for edge in edges)
    box = max(0, left), max(0, top), min(size[0], right), min(size[1], bottom)
    return box if box[0] < box[2] and box[1] < box[3] else None


def word_of(label: str, words: Sequence[str]) -> str | None:
    """The word that a detector means by a label with some of its parts, whose noun comes last; None if it names none.

    Of several, the one of which the label has most, and then the one with the fewest others: "a teddy bear" is no bear.
    """
    seen, parts = _parts(label), {word: _parts(word) for word in words}
    named = [word for word in words if not {*parts[word][-1:]}.isdisjoint(seen)]
    return max(named, key=lambda word: (sum(it in seen for it in parts[word]), -len(parts[word])), default=None)


def _parts(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _article(word: str) -> str:
    return f"{'an' if word[:1].lower() in 'aeiou' else 'a'} {word}"
