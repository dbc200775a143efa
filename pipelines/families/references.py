"""Reference images that a transformer reads behind the image: prepared, encoded once, and counted in tokens."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor

from lora_compose.attention import Backbone, backbone_of
from lora_compose.attention.sites import Grid
from lora_compose.pipelines.calls.call import Call
from lora_compose.pipelines.calls.front import OF_START_IMAGE
from lora_compose.pipelines.denoising.inputs import ByImage
from lora_compose.pipelines.denoising.sampler import Schedule
from lora_compose.pipelines.families.flow_matching import FlowMatchingPipeline
from lora_compose.pipelines.families.image_tasks import ImageTask
from lora_compose.pipelines.images.from_image import FromImage
from lora_compose.pipelines.images.images import read_images


class ReferencesPipeline(FlowMatchingPipeline):
    """A composing pipeline whose calls may have reference images."""

    most_references: ClassVar[int | None] = None
    """How many it reads; None means any number."""
    sized_by_reference: ClassVar[bool] = True
    """Whether an image for which no size is named has that of its reference image."""

    def _read(self, given: dict[str, Any]) -> dict[str, Any]:
        given |= start_and_reference(given)
        return given if self.sized_by_reference and given["reference"] is not None else super()._read(given)

    def reference_tokens(self, references: Sequence[Tensor]) -> Tensor:
        """The latents of prepared reference images, one after the other. Shape: [1, tokens, channels]."""
        raise NotImplementedError

    def read_beside(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> tuple[Tensor, dict[str, Tensor]]:
        """As `read_texts`, of prompts that have reference images; in most families these do not change the text."""
        return self.read_texts(prompts)

    def size_from(self, images: Sequence[Image.Image]) -> tuple[int, int]:
        """Width and height in pixels of images for which none is named, by the reference images."""
        return self.own_size

    def backbone_of(self, call: Call) -> Backbone:
        """The backbone of a call."""
        backbone: Any = backbone_of(self.model)
        if not call.references:
            return backbone
        cells = sum(height * width for height, width in self._grids(call.references))
        return type(backbone)(self.model, reference=True, cells=cells)

    def _grids(self, references: Sequence[Tensor]) -> list[Grid]:
        """Height and width of reference images, in tokens."""
        return [(image.shape[-2] // self.cell, image.shape[-1] // self.cell) for image in references]

    def _plain_arguments(self, arguments: dict[str, Any], start: FromImage | None) -> dict[str, Any]:
        reference, further = arguments.pop("reference"), arguments.pop("image_reference", None)
        image = {"image": opened(reference)} if start is None else {"image_reference": opened(further)}
        return {**super()._plain_arguments(arguments, start), **image}

    @classmethod
    def task_for(cls, inpaints: bool) -> ImageTask:
        """As `ImageTasksPipeline.task_for`."""
        if cls.inpainting is not None:
            return super().task_for(inpaints)
        raise ValueError(
            f"{cls.family} reads image as a reference image, and inpaints nothing here; leave out mask_image, "
            "strength, padding_mask_crop and paste_original, or use a family that inpaints"
        )

    def _further_inputs(self, call: Call, schedule: Schedule) -> Mapping[str, Any]:
        if not call.references:
            return {}
        return {
            "reference": ByImage(self.reference_tokens(call.references)),
            "reference_grids": self._grids(call.references),
        }


def start_and_reference(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """What `image` of a call is: the image to start from, if it has arguments of one, or the reference images.

    Raises ValueError for a reference image of inpainting in another call.
    """
    starts = any(given[name] is not None and given[name] is not False for name in OF_START_IMAGE if name != "image")
    if not starts and given.get("image_reference") is not None:
        raise ValueError(
            "image_reference goes with inpainting: give mask_image as well, or the reference images as image"
        )
    image = given["image"]
    return {"image": image, "reference": None} if starts else {"image": None, "reference": image}


def opened(given: Any) -> Any:
    """The reference images of a call without concepts, whose paths diffusers cannot read."""
    if isinstance(given, list | tuple):
        return [opened(image) for image in given]
    return read_images(given)[0] if isinstance(given, str | Path) else given


def reference_images(given: Any) -> list[Image.Image]:
    """The reference images of a call, of any sizes; none if it is None. Raises ValueError for tensors."""
    images = []
    for entry in [] if given is None else given if isinstance(given, list | tuple) else [given]:
        read = read_images(entry)
        if isinstance(read, Tensor):
            raise ValueError("reference images are PIL images, paths or 8-bit arrays, not tensors")
        images += read
    return images
