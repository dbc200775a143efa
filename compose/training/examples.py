"""Images and captions as the UNet takes them, computed once: text encoders and VAE are frozen."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_compose.compose.training.data import TrainingImage, load_image, square
from lora_compose.compose.training.model import encode_text


@dataclass(frozen=True, eq=False)
class Examples:
    """Encoded images.

    Attributes:
        latents: The means that the VAE gives; of some VAEs the spread is as large as the image, and drawing from it
            would only add noise that nobody has learnt. Shape: [images, channels, height, width].
        caption: Which of the captions is an image's. Shape: [images], whole numbers.
        text: Features of the captions. Shape: [captions, tokens, channels].
        mask: 1 at the trigger. Shape: [captions, tokens, 1].
        pooled: SDXL's pooled features. Shape: [captions, channels].
        time_ids: SDXL's sizes: original, cut off, target; each height and width. Shape: [images, 6].
    """

    latents: Tensor
    caption: Tensor
    text: Tensor
    mask: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None

    def __len__(self) -> int:
        return len(self.latents)


def encode_images(
    pipe: Any, images: Sequence[TrainingImage], triggers: dict[str, tuple[int, ...]], side: int, device: torch.device
) -> Examples:
    """Encodes images and their captions.

    Args:
        pipe: The base model, in float32 on the device.
        images: What to encode.
        triggers: Token positions of the trigger, by caption.
        side: Of the training images, in pixels.
        device: Where the model is.
    """
    captions = list(dict.fromkeys(image.caption for image in images))
    text, pooled = encode_text(pipe, captions, device)
    mask = torch.zeros(*text.shape[:2], 1)
    for row, caption in enumerate(captions):
        mask[row, list(triggers.get(caption, ()))] = 1
    latents, sizes = [], []
    for image in images:
        pixels, cut = square(load_image(image.path), side)
        with torch.no_grad():
            encoded = pipe.vae.encode(pixels[None].to(device)).latent_dist
        latents.append(encoded.mode().cpu() * pipe.vae.config.scaling_factor)
        width, height = image.size
        sizes.append([height, width, *cut, side, side])
    return Examples(
        latents=torch.cat(latents),
        caption=torch.tensor([captions.index(image.caption) for image in images]),
        text=text,
        mask=mask,
        pooled=pooled,
        time_ids=None if pooled is None else torch.tensor(sizes, dtype=torch.float32),
    )
