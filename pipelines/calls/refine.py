"""Repaints each subject of a finished image alone, at the model's own resolution, with its LoRA (a detailer).

For each subject: the part of the image around its mask is cut out and enlarged to the size that the model was made for,
image-to-image with the subject's own text and LoRA, and blended back under the mask. This is diffusers' inpainting with
`padding_mask_crop`; the other subjects' LoRAs do not act.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image
from torch import Tensor

from lora_compose.attention.masks import bounds
from lora_compose.pipelines.calls.call import composed
from lora_compose.pipelines.concepts.concept_set import LoadedConcept
from lora_compose.pipelines.images.output import ComposeOutput, Cost
from lora_compose.pipelines.methods import Settings
from lora_compose.pipelines.scene.mask_images import (
    BLUR,
    PADDING,
    greys,
    in_pixels,
    mask_of_box,
    read_mask_image,
    side_of,
    softened,
)
from lora_compose.pipelines.scene.regions import read_mask
from lora_compose.pipelines.scene.scene import Concept
from lora_compose.pipelines.text.emphasis import plain_text, written
from lora_compose.pipelines.text.prompts import about


class Repaints(Protocol):
    """A pipeline that can inpaint with concepts."""

    @property
    def own_size(self) -> tuple[int, int]:
        """Width and height of the images that the model was made for, in pixels."""
        ...

    def resolve_concepts(self, concepts: Sequence[str | Concept]) -> Sequence[LoadedConcept]:
        """Concepts with their factors."""
        ...

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Makes an image."""
        ...


@dataclass(frozen=True)
class Detailer:
    """How subjects are repainted.

    Attributes:
        strength: The fraction of the steps that are run; higher values change more.
        padding: Context around the mask that is not changed, as a fraction of the longer side of its bounding box.
        blur: Radius of the blend at the border of the mask, as a share of that side.
        method: How the LoRA acts; None is `tara` for LoRAs that were trained for it and `merge` for others.
    """

    strength: float = 0.5
    padding: float = PADDING
    blur: float = BLUR
    method: str | Settings | None = None

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength must be above 0 and at most 1, not {self.strength}")
        for name in ("padding", "blur"):
            if not 0 <= getattr(self, name) <= 2:
                raise ValueError(f"{name} is a share of the subject's side, from 0 to 2, not {getattr(self, name)}")


@dataclass(frozen=True)
class Refined:
    """An image with repainted subjects.

    Attributes:
        subjects: Names of the concepts that have been repainted, in this order.
        cost: Cost of all calls together.
    """

    image: Image.Image
    subjects: tuple[str, ...]
    cost: Cost


def refine(
    pipe: Repaints,
    image: Image.Image,
    prompt: str,
    concepts: Sequence[str | Concept],
    masks: Mapping[str, Any] | None = None,
    how: Detailer | None = None,
    **options: Any,
) -> Refined:
    """Repaints each subject of an image that has a mask or a region.

    Args:
        prompt: Prompt of the image; each subject's text is derived from it.
        concepts: As for a call. Styles act on every subject.
        masks: Where subjects are, by name (`subject_masks` of an output's masks); a concept's own region otherwise.
        options: Arguments of every call, such as `num_inference_steps`, `guidance_scale`, `negative_prompt` and
            `generator`.

    Raises:
        ValueError: If no concept has a mask or a region, or a mask is for no concept.
    """
    how = how or Detailer()
    everyone = [loaded.concept for loaded in pipe.resolve_concepts(concepts)]
    named, styles = [c for c in everyone if not c.is_style], [c for c in everyone if c.is_style]
    subjects = [c for c in named if not c.is_bystander]
    if unknown := (masks or {}).keys() - {c.name for c in subjects}:
        raise ValueError(f"masks name {sorted(unknown)}; the subjects are {', '.join(c.name for c in subjects)}")
    mask_of = {c.name: _mask(c, masks or {}, image.size) for c in subjects}
    if not any(mask_of.values()):
        raise ValueError("it is not known where the subjects are: give masks={name: mask}, or concepts with regions")
    cost, done, plain = Cost(), [], plain_text(composed(prompt))
    width, height = pipe.own_size
    for subject in subjects:
        mask = mask_of[subject.name]
        if mask is None:
            continue
        text = written(about(subject, plain, named))
        acting = [c.model_copy(update={"region": None, "prompt": None}) for c in (subject, *styles)]
        output = pipe(
            prompt=text, concepts=acting, method=how.method or _method_for(pipe, acting), image=image,
            mask_image=softened(mask, how.blur), strength=how.strength,
            padding_mask_crop=round(how.padding * side_of(mask)), output_type="pil",
            **{"width": width, "height": height, **options},
        )  # fmt: skip
        image = output.images[0]
        cost.add(output.cost)
        done.append(subject.name)
    return Refined(image, tuple(done), cost)


@dataclass(frozen=True)
class Origin:
    """The inputs of a call that repaints the subjects of its images.

    Attributes:
        prompts: The prompts, as they were written.
        concepts: The concept set of each.
        columns: For each prompt, the indices of those concepts among the masks.
        options: Arguments of every call that repaints; negative prompts in a list are for one prompt each, or
            for all.
    """

    pipe: Repaints
    prompts: Sequence[str]
    concepts: Sequence[Sequence[Concept]]
    columns: Sequence[Sequence[int]]
    images_per_prompt: int
    options: Mapping[str, Any]

    def refine(self, output: ComposeOutput, index: int, how: Detailer | None, options: Mapping[str, Any]) -> Refined:
        """Repaints the subjects of one image of an output, in its regions, or in the masks of its middle step.

        Raises:
            ValueError: If it is no PIL image, or it has neither regions nor masks.
        """
        image = output.images[index]
        if not isinstance(image, Image.Image):
            raise ValueError("refine() repaints PIL images; leave output_type='pil'")
        prompt = index % len(output.images) // self.images_per_prompt
        concepts = self.concepts[prompt]
        masks: dict[str, Image.Image] = {}
        if output.masks is not None:
            steps = output.masks[len(output.masks) // 2, index]
            recorded = subject_masks(steps[list(self.columns[prompt])], concepts, image.size)
            masks = {c.name: recorded[c.name] for c in concepts if c.region is None and c.name in recorded}
        if not masks and all(concept.region is None for concept in concepts):
            raise ValueError(
                "nothing says where the subjects are: make the image with record_attention=True, or give regions"
                if output.masks is None
                else "the masks that were recorded for the image are empty: give regions"
            )
        given = dict(self.options)
        if isinstance(negative := given.get("negative_prompt"), list):
            given["negative_prompt"] = negative[min(prompt, len(negative) - 1)]
        return refine(self.pipe, image, self.prompts[prompt], concepts, masks, how, **{**given, **options})


def subject_masks(masks: Tensor, concepts: Sequence[Concept], size: tuple[int, int]) -> dict[str, Image.Image]:
    """Masks of the subjects of an image, from the masks of a run.

    Args:
        masks: Of one image and step (`ComposeOutput.masks[step, image]`). Shape: [concepts, height, width], bool.
        concepts: Concepts of the call, in its order.
        size: Width and height of the image.

    Returns:
        By name, the bounding box of each mask; subjects with an empty one are left out.
    """
    by_name = {}
    for concept, mask in zip(concepts, masks.cpu(), strict=True):
        if concept.is_style or concept.is_bystander or not mask.any():
            continue
        rows, columns = bounds(mask)
        height, width = mask.shape
        box = columns.start / width, rows.start / height, columns.stop / width, rows.stop / height
        by_name[concept.name] = mask_of_box(in_pixels(box, *size), *size)
    return by_name


def _mask(concept: Concept, masks: Mapping[str, Any], size: tuple[int, int]) -> Image.Image | None:
    """A subject's mask in the size of the image; None if there is none."""
    if (mask := masks.get(concept.name)) is not None:
        return read_mask_image(mask, size).resize(size)
    if concept.region is None:
        return None
    if isinstance(concept.region, str):
        return greys(Image.fromarray((read_mask(concept.region) * 255).byte().numpy())).resize(size)
    return mask_of_box(in_pixels(concept.region, *size), *size)


def _method_for(pipe: Repaints, concepts: Sequence[Concept]) -> str:
    trained = {loaded.trained_with for loaded in pipe.resolve_concepts(concepts)}
    return "tara" if trained == {"tara"} else "merge"
