"""The start image of image-to-image and inpainting: as given, and prepared for a model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from lora_compose.attention.sites import Grid
from lora_compose.pipelines.concepts.concept_set import LoadedConcept
from lora_compose.pipelines.images.images import read_images
from lora_compose.pipelines.scene.mask_images import (
    Box,
    as_uri,
    each_mask,
    in_pixels,
    is_fractions,
    mask_of_box,
    read_mask_image,
)
from lora_compose.pipelines.scene.regions import read_mask


@dataclass(frozen=True, eq=False)
class FromImage:
    """The start image of a call; with a mask, only a part of it is repainted.

    Attributes:
        images: PIL images in RGB, or a tensor. Shape: [images, channels, height, width].
        masks: White where the image is repainted: one for all images, or one for each; none means image-to-image.
        strength: The fraction of the steps that are run; None means diffusers' default for the model.
        padding_mask_crop: Pixels around the mask; only that part is painted, enlarged to the size of the call.
        paste_original: Whether the pixels outside of the mask are the image's own.
    """

    images: list[Image.Image] | Tensor
    masks: Sequence[Image.Image] = ()
    strength: float | None = None
    padding_mask_crop: int | None = None
    paste_original: bool = False

    @classmethod
    def of(
        cls,
        image: Any,
        mask_image: Any,
        strength: float | None,
        padding_mask_crop: int | None,
        paste_original: bool,
        latent_channels: int | None = None,
        scale: int = 1,
    ) -> "FromImage | None":
        """The start image from the arguments of a call; None means text-to-image.

        Args:
            image: As for `read_images`.
            mask_image: As for `read_mask_image`, or a list of such, one for each image.
            padding_mask_crop: Pixels around the mask.
            latent_channels: Channels of latents of the model; None takes no latents.
            scale: Pixels of a latent cell on each side; boxes are in pixels.

        Raises:
            ValueError: For images, masks and numbers that cannot be used.
        """
        if image is None:
            others = {
                "mask_image": mask_image is not None, "strength": strength is not None,
                "padding_mask_crop": padding_mask_crop is not None, "paste_original": paste_original,
            }  # fmt: skip
            if without := [name for name, is_given in others.items() if is_given]:
                raise ValueError(f"{' and '.join(without)} needs an image: give image=... as well")
            return None
        images = read_images(image, latent_channels)
        if strength is not None and not 0 <= strength <= 1:
            raise ValueError(
                f"strength must lie between 0 and 1, not {strength}: 1 ignores the image, 0 changes nothing"
            )
        if mask_image is None:
            if padding_mask_crop is not None or paste_original:
                raise ValueError("padding_mask_crop and paste_original need a mask: give mask_image=... as well")
            return cls(images, (), strength)
        width, height = _size(images)
        size = (width * scale, height * scale) if _are_latents(images) else (width, height)
        masks = [read_mask_image(mask, size) for mask in each_mask(mask_image)]
        for mask in masks:
            if mask.getextrema()[1] < 128:  # pyright: ignore[reportOperatorIssue]
                raise ValueError(_PALE)
            _check_sizes(size, mask.size, exactly=padding_mask_crop is not None or paste_original)
        whole = isinstance(padding_mask_crop, int) and not isinstance(padding_mask_crop, bool)
        if padding_mask_crop is not None and (not whole or padding_mask_crop < 0):
            raise ValueError(f"padding_mask_crop is a number of pixels, at least 0, not {padding_mask_crop!r}")
        if (padding_mask_crop is not None or paste_original) and isinstance(images, Tensor):
            raise ValueError(
                "padding_mask_crop and paste_original work with PIL images, paths and 8-bit arrays, not with tensors"
            )
        if padding_mask_crop is not None and len(masks) > 1:
            raise ValueError(f"padding_mask_crop works with one mask_image for all images, not with {len(masks)}")
        return cls(images, masks, strength, padding_mask_crop, paste_original)

    def check_masks(self, prompts: int) -> None:
        """Raises ValueError if there are several masks, but not one for each prompt."""
        if len(self.masks) > 1 and len(self.masks) != prompts:
            raise ValueError(
                f"mask_image is a list of {len(self.masks)} masks, and there are {prompts} prompts; give one mask, or "
                "one for each prompt"
            )

    @property
    def inpaints(self) -> bool:
        """Whether a part of the image is repainted."""
        return bool(self.masks)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the images; latents count as pixels."""
        return _size(self.images)

    @property
    def is_latents(self) -> bool:
        """Whether the images are given as latents."""
        return _are_latents(self.images)

    def rounded_size(self, scale: int) -> tuple[int, int]:
        """Width and height of the images in pixels, rounded down to whole latent cells of so many pixels."""
        width, height = self.size
        return (width * scale, height * scale) if self.is_latents else (width // scale * scale, height // scale * scale)

    def check_size(self, scale: int) -> None:
        """Raises ValueError if the image is smaller than a latent cell of so many pixels."""
        if not self.is_latents and min(self.size) < scale:
            raise ValueError(
                f"image has {self.size[0]} x {self.size[1]} pixels; this model needs at least {scale} on each side"
            )

    @property
    def arguments(self) -> Mapping[str, Any]:
        """The fields as arguments of diffusers' pipelines."""
        arguments: dict[str, Any] = {"image": self.images}
        if isinstance(self.images, list) and len(self.images) == 1:
            arguments["image"] = self.images[0]
        if self.strength is not None:
            arguments["strength"] = self.strength
        if self.masks:
            arguments["mask_image"] = self.masks[0] if len(self.masks) == 1 else list(self.masks)
        if self.padding_mask_crop is not None:
            arguments["padding_mask_crop"] = self.padding_mask_crop
        return arguments

    def pasted(self, images: Sequence[Image.Image], processor: Any, crop: Box | None = None) -> list[Image.Image]:
        """Pastes the original pixels outside of the mask into results; grey mask values blend.

        Args:
            crop: The part of the image that was worked on, in pixels; None means all.
        """
        originals, masks = (_for_each(values, len(images)) for values in (self.images, self.masks))
        width, height = self.size
        size = {"height": height, "width": width}
        parts = images if crop is not None else [processor.resize(image, **size) for image in images]
        return [
            processor.apply_overlay(mask, init_image=original, image=part, crop_coords=crop)
            for mask, original, part in zip(masks, originals, parts, strict=True)
        ]


class TaskPipeline(Protocol):
    """diffusers' pipeline for image-to-image or inpainting, as far as all families read it."""

    vae_scale_factor: int

    @property
    def image_processor(self) -> VaeImageProcessor:
        """How images are prepared."""
        ...

    def get_timesteps(self, num_inference_steps: int, strength: float, device: Any) -> tuple[Any, Any]:
        """The timesteps that a strength leaves, and the number of steps."""
        ...


@dataclass(frozen=True, eq=False)
class Source:
    """A start image prepared for a model.

    Attributes:
        pipeline: diffusers' pipeline for the task, with the same components.
        strength: The share of the steps that are run.
        rounds_up: Whether their number is rounded up.
        pixels: The part of the image that is worked on, as the VAE reads it, or latents. Shape: [images, channels,
            height, width].
        mask: 1 where it is painted. Shape: [1 or images, 1, height, width]; None is image-to-image.
        size: Width and height of the part that is worked on, in pixels.
        crop: The part of the image that is worked on, in its pixels; None is all of it.
    """

    given: FromImage
    pipeline: TaskPipeline
    strength: float
    rounds_up: bool
    pixels: Tensor
    mask: Tensor | None
    size: tuple[int, int]
    crop: Box | None

    @classmethod
    def of(
        cls, given: FromImage, pipeline: TaskPipeline, strength: float, size: tuple[int, int], *, rounds_up: bool
    ) -> "Source":
        """Prepares an image with diffusers' processors.

        Args:
            size: Width and height of what is worked on, in pixels.
            rounds_up: Whether the number of steps is rounded up.

        Raises:
            ValueError: If latents are for another size, or nothing would be painted.
        """
        scale, (width, height) = pipeline.vae_scale_factor, size
        inpainting: Any = pipeline  # with a mask, it has a processor for masks as well
        crop, mode = None, "default"
        if given.padding_mask_crop is not None:
            crop = inpainting.mask_processor.get_crop_region(
                given.masks[0], width=width, height=height, pad=given.padding_mask_crop
            )
            mode = "fill"
        how = {"height": height, "width": width, "crops_coords": crop, "resize_mode": mode}
        pixels = pipeline.image_processor.preprocess(given.images, **how)
        rows, columns = (side * scale if given.is_latents else side for side in pixels.shape[-2:])
        if given.is_latents and (columns, rows) != size:
            raise ValueError(f"these latents are for {columns} x {rows} pixels, and the call for {width} x {height}")
        mask = inpainting.mask_processor.preprocess(list(given.masks), **how) if given.inpaints else None
        if mask is not None and not (mask > 0).any():
            raise ValueError(_PALE)
        return cls(given, pipeline, strength, rounds_up, pixels, mask, (columns, rows), crop)

    @property
    def image_size(self) -> tuple[int, int]:
        """Width and height of the image in pixels; regions are in its coordinates."""
        return self.size if self.given.is_latents else self.given.size

    def painted(self, latent_grid: Grid) -> Tensor | None:
        """1 at the cells [height, width] that are repainted in any image, as in diffusers; None means everywhere."""
        return None if self.mask is None else F.interpolate(self.mask, latent_grid).amax(dim=0)[0]

    def timesteps(self, scheduler: Any, steps: int, device: torch.device) -> tuple[Tensor, int]:
        """The timesteps that the strength leaves of a scheduler, and the number of their steps."""
        reading: Any = SimpleNamespace(scheduler=scheduler)  # all that diffusers' method reads of its pipeline
        return type(self.pipeline).get_timesteps(reading, steps, strength=self.strength, device=device)

    def placed(self, loaded: LoadedConcept) -> LoadedConcept:
        """The concept with its region in the part that is worked on. ValueError if it lies outside of that."""
        region = loaded.concept.region
        if region is None or (self.crop is None and self.image_size == self.size):
            return loaded
        width, height = self.image_size
        if isinstance(region, str):
            mask = Image.fromarray((read_mask(region) * 255).byte().numpy()).resize((width, height))
        else:
            mask = mask_of_box(in_pixels(region, width, height), width, height)
        cut = mask if self.crop is None else mask.crop(self.crop)
        processor = VaeImageProcessor(
            vae_scale_factor=self.pipeline.vae_scale_factor, resample="nearest"
        )  # borders stay sharp
        width, height = self.size
        mode = "default" if self.crop is None else "fill"
        shown: Any = processor.resize(cut, height=height, width=width, resize_mode=mode)
        shown = shown.convert("L")
        if shown.getextrema()[1] < 128:
            raise ValueError(
                f"the region of concept {loaded.concept.name!r} lies outside of what is painted; widen "
                "padding_mask_crop, or leave the concept out"
            )
        return replace(loaded, concept=loaded.concept.model_copy(update={"region": as_uri(shown)}))


_PALE = "mask_image has no pixel above half of white at the size that is painted; nothing would be painted"


def steps_left(steps: int, strength: float, *, rounds_up: bool) -> int:
    """How many of the steps a strength leaves, as in diffusers' pipelines, which round differently."""
    return steps - int(steps - steps * strength) if rounds_up else int(steps * strength)


def check_steps(steps: int, strength: float, *, rounds_up: bool) -> None:
    """Raises ValueError if a strength leaves no step of so many."""
    if steps_left(steps, strength, rounds_up=rounds_up) < 1:
        least = "more than 0" if rounds_up else f"at least {math.ceil(100 / max(steps, 1)) / 100:g}, or more steps"
        raise ValueError(f"strength={strength:g} leaves none of the {steps} steps; give {least}")


def region_in_pixels(loaded: LoadedConcept, width: int, height: int) -> LoadedConcept:
    """The concept with a box in fractions converted to pixels."""
    region = loaded.concept.region
    if region is None or isinstance(region, str) or not is_fractions(region):
        return loaded
    return replace(loaded, concept=loaded.concept.model_copy(update={"region": in_pixels(region, width, height)}))


def _for_each(values: Any, images: int) -> list[Any]:
    """What is given for each image: one for all, or one for each prompt, which may have several images."""
    return [values[i * len(values) // images] for i in range(images)]


def _size(images: list[Image.Image] | Tensor) -> tuple[int, int]:
    return (images.shape[-1], images.shape[-2]) if isinstance(images, Tensor) else images[0].size


def _are_latents(images: list[Image.Image] | Tensor) -> bool:
    return isinstance(images, Tensor) and images.shape[1] != 3


def _check_sizes(image: tuple[int, int], mask: tuple[int, int], *, exactly: bool) -> None:
    same = math.isclose(mask[0] * image[1], mask[1] * image[0], rel_tol=0.02)
    if mask != image and (exactly or not same):
        raise ValueError(
            f"mask_image has {mask[0]} x {mask[1]} pixels, the image {image[0]} x {image[1]}; expected "
            + ("the same size" if exactly else "the same proportions")
        )
