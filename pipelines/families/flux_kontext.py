"""FLUX.1 Kontext with concepts: FLUX.1 that reads a reference image behind the image that it makes."""

from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import FluxKontextInpaintPipeline, FluxKontextPipeline
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from PIL import Image
from torch import Tensor

from lora_compose.attention.backbones.joint import packed
from lora_compose.pipelines.calls.call import Call
from lora_compose.pipelines.calls.front import Begun, Request, front
from lora_compose.pipelines.denoising.inputs import ByImage
from lora_compose.pipelines.families.flux import FluxCalls
from lora_compose.pipelines.families.image_tasks import ImageTask
from lora_compose.pipelines.families.references import ReferencesPipeline, reference_images
from lora_compose.pipelines.images.from_image import FromImage


class ComposeFluxKontextPipeline(ReferencesPipeline, FluxCalls, FluxKontextPipeline):  # pyright: ignore[reportIncompatibleMethodOverride]
    """diffusers' `FluxKontextPipeline` whose calls may name concepts; latents keep their height and width, unpacked."""

    family = "FLUX.1 Kontext"
    reads = (*FluxCalls.reads, "image", "max_area", "_auto_resize")
    inpainting = ImageTask(FluxKontextInpaintPipeline, resizes=False)
    starts_from_latents = False  # diffusers refuses them
    prepared = 0, 6, 1
    most_references = 1
    sized_by_reference = False

    def _read(self, given: dict[str, Any]) -> dict[str, Any]:
        named = given["width"] is not None or given["height"] is not None
        return {**super()._read(given), "named": named}  # a size that is the model's own may be changed

    @front(FluxKontextPipeline.__call__, image_reference=(Any, None))
    def __call__(self, begun: Begun) -> Request:
        """Generates images, as `ComposePipeline.__call__`.

        Args:
            image: The reference image, which is read at a size that the model knows, and is the same for all images;
                LoRAs act on it only if a concept says so (`Concept.references`), and regions are those of the image
                that is made. With a mask, what inpainting starts from, at such a size; the model reads it as the
                reference image, too.
            image_reference: What inpainting reads as the reference image in place of `image`.
            padding_mask_crop: Only with concepts: without them diffusers gives back the part that it has painted.

        Raises:
            ValueError: For anything that does not fit together, before anything is changed. With concepts, also for a
                size of another area than `max_area`, for which diffusers makes images of another size.
        """
        given, (source, size) = begun.given, self._source(begun)
        if source is not None:
            references = self._references(given["image_reference"], given["_auto_resize"]) or [source.pixels]
            return self._flux_request(begun, size, source, references)
        asked, area = (given["width"], given["height"]), given["max_area"]
        size = self._of_area(*asked, area)
        if given["named"] and size != tuple(map(self._rounded, asked)):
            raise ValueError(
                f"{self.family} makes images of max_area={area} pixels, here {size[0]} x {size[1]} for {asked[0]} x "
                f"{asked[1]}, in which regions would lie elsewhere; give that size, or max_area={asked[0] * asked[1]}"
            )
        return self._flux_request(begun, size, None, self._references(given["reference"], given["_auto_resize"]))

    def _plain_arguments(self, arguments: dict[str, Any], start: FromImage | None) -> dict[str, Any]:
        del arguments["named"]
        if start is not None and start.padding_mask_crop is not None:
            raise ValueError(
                "without concepts, diffusers gives back the part around the mask, and not the image with it; leave out "
                "padding_mask_crop, or name concepts"
            )
        return super()._plain_arguments(arguments, start)

    def sized(self, width: int, height: int) -> dict[str, Any]:
        """As `ImageTasksPipeline.sized`; diffusers takes the size as a shape, and the area apart."""
        return {**super().sized(width, height), "max_area": width * height}

    def _of_area(self, width: int, height: int, area: int) -> tuple[int, int]:
        """Width and height of an image of this shape and area, as diffusers rounds them."""
        ratio = width / height
        return self._rounded(round((area * ratio) ** 0.5)), self._rounded(round((area / ratio) ** 0.5))

    def size_from_start(self, width: int, height: int) -> tuple[int, int]:
        """As `ImageTasksPipeline.size_from_start`: a size that the model knows."""
        return self._read_size(width, height, resizes=True)

    def _kept_size(self, given: FromImage, arguments: Mapping[str, Any]) -> tuple[int, int]:
        return self._read_size(*given.size, resizes=arguments["_auto_resize"])

    def _image_size(self, given: FromImage, arguments: Mapping[str, Any]) -> tuple[int, int]:
        width, height = super()._image_size(given, arguments)
        if arguments["max_area"] not in (1024**2, width * height):
            raise ValueError(f"max_area is not read in inpainting, which is at {width} x {height} here; leave it out")
        return width, height

    def _read_size(self, width: int, height: int, *, resizes: bool) -> tuple[int, int]:
        """Width and height at which the model reads an image of a size: those it knows, or whole tokens."""
        width, height = (max(self.cell, self._rounded(side)) for side in (width, height))
        if resizes:
            ratio = width / height
            _, width, height = min((abs(ratio - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
        return self._rounded(width), self._rounded(height)

    def _inputs_from_image(self, call: Call, image: Tensor) -> Mapping[str, Any]:
        (reference,) = call.references
        is_start = call.source is not None and reference is call.source.pixels
        tokens = packed(image) if is_start else self.reference_tokens(call.references)
        return {"reference": ByImage(tokens), "reference_grids": self._grids(call.references)}

    def _references(self, given: Any, resizes: bool) -> list[Tensor]:
        """The reference image as diffusers prepares it, if any. Raises ValueError for several, and for tensors."""
        images = reference_images(given)
        if len(images) > 1:
            raise ValueError(
                f"{self.family} reads one reference image with concepts, the same for all prompts, not {len(images)}; "
                "call it for each, or put them side by side into one image"
            )
        return [self._prepared(image, resizes) for image in images]

    def _prepared(self, image: Image.Image, resizes: bool) -> Tensor:
        width, height = self._read_size(*image.size, resizes=resizes)
        return self.image_processor.preprocess(image, height=height, width=width)

    def reference_tokens(self, references: Sequence[Tensor]) -> Tensor:
        """As `ReferencesPipeline.reference_tokens`, of one image."""
        (image,) = references
        return packed(self.latents_of(image.to(self._execution_device)))
