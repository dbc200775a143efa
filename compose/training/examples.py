"""Images and captions as the network takes them, computed once: text encoders and VAE are frozen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_compose.compose.training.bases import Base
from lora_compose.compose.training.data import Picture, load_picture, square


@dataclass(frozen=True, eq=False)
class Examples:
    """Encoded images.

    Attributes:
        latents: The means that the VAE gives; of some VAEs the spread is as large as the image, and drawing from it
            would only add noise that nobody has learnt. Shape: [images, channels, height, width].
        caption: Which of the captions is an image's. Shape: [images], whole numbers.
        text: Features of the captions. Shape: [captions, tokens, channels].
        mask: 1 at the trigger. Shape: [captions, tokens, 1].
        by_caption: What the network takes beside the text, one row per caption: pooled features of SDXL.
        by_picture: The same, one row per image: sizes of SDXL, original, cut off, target; each height and width.
    """

    latents: Tensor
    caption: Tensor
    text: Tensor
    mask: Tensor
    by_caption: Mapping[str, Tensor] = field(default_factory=dict)
    by_picture: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.latents)


def encode_pictures(
    base: Base, pictures: Sequence[Picture], triggers: dict[str, tuple[int, ...]], side: int
) -> Examples:
    """Encodes images and their captions.

    Args:
        base: The base model, whose text encoders and VAE are in float32.
        pictures: What to encode.
        triggers: Token positions of the trigger, by caption.
        side: Of the training images, in pixels.
    """
    captions = list(dict.fromkeys(picture.caption for picture in pictures))
    text, by_caption = base.texts(captions)
    mask = torch.zeros(*text.shape[:2], 1)
    for row, caption in enumerate(captions):
        mask[row, list(triggers.get(caption, ()))] = 1
    latents, sizes = [], []
    for picture in pictures:
        pixels, cut = square(load_picture(picture.path), side)
        latents.append(base.latents(pixels[None]))
        sizes.append(base.sizes(picture.size, cut, side))
    return Examples(
        latents=torch.cat(latents),
        caption=torch.tensor([captions.index(picture.caption) for picture in pictures]),
        text=text,
        mask=mask,
        by_caption=by_caption,
        by_picture={name: torch.tensor([one[name] for one in sizes], dtype=torch.float32) for name in sizes[0]},
    )
