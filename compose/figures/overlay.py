"""Attention over images: where the model looked for each concept, step by step."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

PALETTE = ("#1f9e89", "#e07a1f", "#7a5cd6", "#c9427d", "#3b82c4", "#8a9a1b", "#b5553c", "#5c6b8a")
"""Colours of concepts, in order; readable on light and dark backgrounds."""

_GREY = 0.35  # how much of the image's light stays under a map
_TINT = 0.45  # of a mask
_SIDE = 384  # least longer side, so that small images are not drawn coarse


@dataclass(frozen=True, eq=False)
class Attention:
    """Attention maps and masks of each concept during a call.

    Attributes:
        steps: The recorded steps.
        maps: Shape: [steps, images, concepts, height, width], fp32.
        masks: Shape: as maps, bool.
        draft: Maps of a draft before the first step, if the method made one. Shape: [images, concepts, height, width].
    """

    steps: tuple[int, ...]
    maps: Tensor
    masks: Tensor
    draft: Tensor | None = None


def colour(index: int) -> str:
    """The colour of a concept."""
    return PALETTE[index % len(PALETTE)]


def heat(image: Image.Image, attention: Attention, concept: int, step: int | None) -> Image.Image:
    """A concept's map in its colour over the first image, in grey: at a recorded step, or the mean over all."""
    maps = attention.maps[:, 0, concept]
    return _heat(image, maps.mean(dim=0) if step is None else maps[step], concept)


def draft_heat(image: Image.Image, draft: Tensor, concept: int) -> Image.Image:
    """A concept's map of a draft over the first image, which stays grey where the concept was not looked for."""
    return _heat(image, draft[0, concept], concept)


def _heat(image: Image.Image, chosen: Tensor, concept: int) -> Image.Image:
    chosen = (chosen - chosen.min()) / (chosen.max() - chosen.min()).clamp(min=1e-12)
    ground = _grown(image)
    strength = _spread(chosen.numpy(), ground.size)[..., None]
    grey = np.asarray(ground.convert("L").convert("RGB"), np.float32) * _GREY
    ink = np.array(_rgb(colour(concept)), np.float32)
    return Image.fromarray(np.clip(grey + strength * (ink * 0.9 + 20), 0, 255).astype(np.uint8))


def masks(image: Image.Image, attention: Attention, step: int | None) -> Image.Image:
    """Region ownership: the masks of all concepts in their colours over the first image, at a recorded step.

    Without a step, cells that belong to a concept in at least half of the steps.
    """
    by_step = attention.masks[:, 0].float()
    chosen = (by_step.mean(dim=0) >= 0.5) if step is None else by_step[step] > 0
    ground = _grown(image)
    pixels = np.asarray(ground, np.float32).copy()
    for concept, mask in enumerate(chosen.numpy()):
        inside = np.asarray(Image.fromarray(mask).resize(ground.size, Image.Resampling.NEAREST))[..., None]
        ink = np.array(_rgb(colour(concept)), np.float32)
        pixels = np.where(inside, (1 - _TINT) * pixels + _TINT * ink, pixels)
    return Image.fromarray(pixels.astype(np.uint8))


def division(size: tuple[int, int], maps: Tensor, owned: Tensor, subjects: Sequence[int]) -> Image.Image:
    """The division of a draft, in the colours of its subjects: brighter where the model puts one of them.

    For an image of this width and height, by the attention to each concept in fp32, 0 for those that were not looked
    for, and the cells of each, bool. Shape of both: [images, concepts, height, width]. `subjects` are indices of
    concepts.
    """
    only = torch.zeros_like(owned)
    only[:, list(subjects)] = owned[:, list(subjects)]
    relative = maps[0] / maps[0].amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)
    strength = _spread(relative.amax(dim=0).numpy(), size)
    ground = Image.fromarray((255 * strength).astype(np.uint8)).convert("RGB")
    return masks(ground, Attention((0,), maps[None], only[None]), None)


def outlined(image: Image.Image, boxes: Sequence[tuple[int, int, int, int] | None]) -> Image.Image:
    """The image with the concepts' boxes in their colours."""
    ground = _grown(image)
    scale = ground.width / image.width
    draw = ImageDraw.Draw(ground)
    for concept, box in enumerate(boxes):
        if box is not None:
            left, top, right, bottom = (round(edge * scale) for edge in box)
            draw.rectangle((left, top, right - 1, bottom - 1), outline=_rgb(colour(concept)), width=3)
    return ground


def _grown(image: Image.Image) -> Image.Image:
    scale = max(1, round(_SIDE / max(image.size)))
    return image.convert("RGB").resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def _spread(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(values.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)).clip(0, 1)


def _rgb(text: str) -> tuple[int, int, int]:
    red, green, blue = (int(text[i : i + 2], 16) for i in (1, 3, 5))
    return red, green, blue
