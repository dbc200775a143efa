"""Images and captions as the network takes them, computed once: text encoders and VAE are frozen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lora_compose.compose.training.bases import Base
from lora_compose.compose.training.data import TrainingImage, load_image, square


@dataclass(frozen=True, eq=False)
class Examples:
    """Encoded images.

    Attributes:
        latents: The means of the VAE; sampling would only add noise. Shape: [images, channels, height, width].
        caption: Index of each image's caption. Shape: [images], integers.
        text: Features of the captions. Shape: [captions, tokens, channels].
        mask: 1 at the trigger. Shape: [captions, tokens, 1].
        by_caption: Further inputs of the network, one row per caption: pooled features of SDXL.
        by_image: The same, one row per image: sizes of SDXL, original, cut off, target; each height and width.
    """

    latents: Tensor
    caption: Tensor
    text: Tensor
    mask: Tensor
    by_caption: Mapping[str, Tensor] = field(default_factory=dict)
    by_image: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.latents)


def of_class(base: Base, concept: Examples, captions: Sequence[str]) -> Examples:
    """The concept's images with captions about its class, one for each of the concept's captions, and no trigger."""
    text, by_caption = base.texts(list(captions))
    return replace(concept, text=text, mask=torch.zeros(*text.shape[:2], 1), by_caption=by_caption)


def encode_images(
    base: Base, images: Sequence[TrainingImage], triggers: dict[str, tuple[int, ...]], side: int
) -> Examples:
    """Encodes images and their captions by a base model in float32; `triggers` are token positions by caption."""
    captions = list(dict.fromkeys(image.caption for image in images))
    text, by_caption = base.texts(captions)
    mask = torch.zeros(*text.shape[:2], 1)
    for row, caption in enumerate(captions):
        mask[row, list(triggers.get(caption, ()))] = 1
    latents, sizes = [], []
    for image in images:
        pixels, cut = square(load_image(image.path), side)
        latents.append(base.latents(pixels[None]))
        sizes.append(base.sizes(image.size, cut, side))
    return Examples(
        latents=torch.cat(latents),
        caption=torch.tensor([captions.index(image.caption) for image in images]),
        text=text,
        mask=mask,
        by_caption=by_caption,
        by_image={name: torch.tensor([size[name] for size in sizes], dtype=torch.float32) for name in sizes[0]},
    )
