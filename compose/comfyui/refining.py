"""Repaints each subject of an image alone, enlarged, with its LoRA (a detailer), as `pipelines.calls.refine` does."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lora_compose.attention.masks import bounds
from lora_compose.compose.comfyui.composition import on_grid
from lora_compose.compose.comfyui.concepts import NodeConcept, subjects_of, texts_about
from lora_compose.compose.comfyui.weights import read_weights
from lora_compose.pipelines.scene.mask_images import BLUR, PADDING, side_of, softened

Repaint = Callable[[Sequence[NodeConcept], str, Tensor, Tensor], Tensor]
"""Repaints parts of images with concepts and a text, inside of a mask. Shapes: [images, height, width, 3] and [height,
width]."""

_MULTIPLE = 16
"""Sides of what is repainted are multiples of this; models halve them, VAEs three or four times."""


def refined(images: Tensor, concepts: Sequence[NodeConcept], text: str, size: int, repaint: Repaint) -> Tensor:
    """Images whose subjects have been repainted, one after the other; nothing outside of their regions changes.

    Args:
        images: Shape: [images, height, width, 3], in 0..1.
        concepts: Subjects without a region or without a LoRA are left as they are; styles act on every subject.
        text: The text of the images; each subject's text is made of it.
        size: The longer side at which a subject is repainted.

    Raises:
        ValueError: If no subject with a LoRA has a region, or no text can be made about one.
    """
    subjects, images = subjects_of(concepts), images.clone()
    styles = [concept for i, concept in enumerate(concepts) if i not in subjects]
    chosen = [concepts[i] for i in subjects if concepts[i].path is not None]
    if all(concept.region is None for concept in chosen):
        left = ", ".join(concept.name for concept in subjects.values() if concept.is_bystander)
        raise ValueError(
            "it is not known where the subjects are: connect the masks of Draft preview, or give the concepts boxes or "
            "masks" + (f"; {left} has no LoRA, and stays as it is" if left else "")
        )
    texts = texts_about([concept.scene for concept in chosen], read_weights(text), [*subjects.values()])
    for subject, own in zip(chosen, texts, strict=True):
        if subject.region is None:
            continue
        mask = on_grid(subject.region, (images.shape[1], images.shape[2]))
        mask = Image.fromarray((mask * 255).round().byte().numpy())
        share = torch.from_numpy(np.array(softened(mask, BLUR))) / 255
        if not share.any():
            raise ValueError(f"the mask of {subject.scene.name} is too thin to be seen in the image; make it wider")
        rows, columns = _around(share, round(PADDING * side_of(mask)))
        part, share = images[:, rows, columns], share[rows, columns, None]
        acting = [
            NodeConcept(concept.path, concept.scene.model_copy(update={"prompt": None}))
            for concept in (subject, *styles)
        ]
        large = _enlarged(part.shape[1], part.shape[2], size)
        painted = repaint(acting, own, _resized(part, large), _resized(share[None], large)[0, ..., 0])
        painted = _resized(painted, (part.shape[1], part.shape[2])).to(part)
        images[:, rows, columns] = part + share.to(part) * (painted - part)
    return images


def _around(mask: Tensor, padding: int) -> tuple[slice, slice]:
    """Rows and columns of what is inside of a mask, with some around it."""
    rows, columns = bounds(mask > 0)
    return slice(max(0, rows.start - padding), rows.stop + padding), slice(
        max(0, columns.start - padding), columns.stop + padding
    )


def _enlarged(height: int, width: int, size: int) -> tuple[int, int]:
    scale = size / max(height, width) / _MULTIPLE
    return max(1, round(height * scale)) * _MULTIPLE, max(1, round(width * scale)) * _MULTIPLE


def _resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Shape: [images, height, width, channels]."""
    resized = F.interpolate(images.movedim(-1, 1).float(), size, mode="bicubic", antialias=True)
    return resized.movedim(1, -1).clamp(0, 1)
