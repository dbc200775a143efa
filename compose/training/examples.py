"""Images and captions as the network takes them, computed once: text encoders and VAE are frozen."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from lora_compose.compose.training.bases import Base
from lora_compose.compose.training.data import ReferenceImage, TrainingImage, load_image, pixels_of, square


@dataclass(frozen=True, eq=False)
class Examples:
    """Encoded images.

    Attributes:
        latents: The means of the VAE; sampling would only add noise. Shape: [images, channels, height, width].
        caption: Index of each image's caption. Shape: [images], integers.
        text: Features of the captions; of two images with one caption, but other references, there are two. Shape:
            [captions, tokens, channels].
        mask: 1 at the trigger. Shape: [captions, tokens, 1].
        by_caption: Further inputs of the network, one row per caption: pooled features of SDXL.
        by_image: The same, one row per image: sizes of SDXL, original, cut off, target, each height and width; tokens
            of "reference" images.
    """

    latents: Tensor
    caption: Tensor
    text: Tensor
    mask: Tensor
    by_caption: Mapping[str, Tensor] = field(default_factory=dict)
    by_image: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.latents)


def of_class(base: Base, concept: Examples, images: Sequence[TrainingImage], side: int) -> Examples:
    """The concept's images, once or several times, with captions of `images` in place of their own; no trigger."""
    texts, times = _encode_texts(base, images, {}, side), len(images) // len(concept)
    by_image = {name: torch.cat([value] * times) for name, value in concept.by_image.items()}
    return replace(texts, latents=torch.cat([concept.latents] * times), by_image=by_image)


def of_one_length(*parts: Examples) -> Iterator[Examples]:
    """Examples whose texts are padded to one length, as one batch needs it; most families pad all texts alike."""
    longest = max(part.text.shape[1] for part in parts)
    for part in parts:
        behind = (0, 0, 0, longest - part.text.shape[1])
        yield replace(part, text=pad(part.text, behind), mask=pad(part.mask, behind))


def encode_images(
    base: Base, images: Sequence[TrainingImage], triggers: dict[str, tuple[int, ...]], side: int
) -> Examples:
    """Encodes images and their captions by a base model in float32; `triggers` are token positions by caption."""
    texts = _encode_texts(base, images, triggers, side)
    latents, added = [], []
    for image in images:
        centre, cut = square(load_image(image.path), side)
        latents.append(base.latents(pixels_of(centre)))
        row = {name: torch.tensor([numbers]) for name, numbers in base.sizes(image.size, cut, side).items()}
        if image.references:
            row["reference"] = base.reference([pixels_of(each) for each in squares(image.references, side)])
        added.append(row)
    by_image = {name: torch.cat([row[name] for row in added]).float() for name in added[0]}
    return replace(texts, latents=torch.cat(latents), by_image=by_image)


def squares(references: Sequence[ReferenceImage], side: int) -> list[Image.Image]:
    """Reference images as they are trained on: cut and resized as the training image."""
    return [square(load_image(reference.path), side)[0] for reference in references]


def _encode_texts(
    base: Base, images: Sequence[TrainingImage], triggers: dict[str, tuple[int, ...]], side: int
) -> Examples:
    """The captions of images; no latents yet."""
    shown = list(dict.fromkeys((image.caption, image.references) for image in images))
    text, by_caption = base.texts([caption for caption, _ in shown], [squares(each, side) for _, each in shown])
    mask = torch.zeros(*text.shape[:2], 1)
    for row, (caption, _) in enumerate(shown):
        mask[row, list(triggers.get(caption, ()))] = 1
    caption = torch.tensor([shown.index((image.caption, image.references)) for image in images])
    return Examples(torch.empty(0), caption, text, mask, by_caption)
