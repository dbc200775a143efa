"""`Concept`, `Scene` and `Run`: what an image shows and how it is made, frozen and validated.

No torch is needed: the command line validates everything before slow imports.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from lora_compose.pipelines.scene.given import as_fields, is_fields
from lora_compose.pipelines.scene.mask_images import URI_PREFIX, Box, is_fractions, region_of
from lora_compose.pipelines.scene.sources import LoraFiles, weighted
from lora_compose.pipelines.scene.strength import Weight, check_sane, read_blocks, read_weight
from lora_compose.pipelines.support.field_errors import FieldError
from lora_compose.pipelines.support.words import spaced, without_ending


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    if not TYPE_CHECKING:  # which would hide the fields from editors

        def __init__(self, /, *unnamed: Any, **fields: Any) -> None:
            if unnamed:
                first = next(iter(type(self).model_fields))
                raise TypeError(f"the fields of a {type(self).__name__} are given by name: {first}={unnamed[0]!r}")
            try:
                super().__init__(**fields)
            except ValidationError as error:
                raise FieldError(type(self), error) from None

        # pydantic goes on to read files and nested fields without it, so that errors name the place in the whole.
        __init__.__pydantic_base_init__ = True

    def __repr_args__(self) -> Iterator[tuple[str, Any]]:
        """The fields that are not at their defaults; the others would hide them."""
        for name, field in type(self).model_fields.items():
            if (value := getattr(self, name)) != field.get_default(call_default_factory=True):
                yield name, value


def _proper(box: Any) -> Any:
    left, top, right, bottom = box
    if not (0 <= left < right and 0 <= top < bottom):
        raise ValueError(
            f"a region is (left, top, right, bottom) in pixels with 0 <= left < right and 0 <= top < bottom, not {box}"
        )
    return box


Region = Annotated[Box, AfterValidator(_proper)]
"""A box in output pixels: left, top, right, bottom; right and bottom are outside."""

Fractions = Annotated[tuple[float, float, float, float], AfterValidator(_proper)]
"""A box in fractions of the image, 0 to 1; one of the numbers is a float."""

MaskFile = Annotated[str, Field(pattern=r"(?i)(^data:image/png;base64,|\.(png|jpe?g|webp|bmp)$)")]
"""The path of a mask image (white = inside), or the image itself as a data URI."""


def _kind(region: Any) -> str:
    if isinstance(region, str):
        return "mask"
    numbers = isinstance(region, list | tuple) and all(isinstance(side, int | float) for side in region)
    return "fractions" if numbers and is_fractions(region) else "box"


MOST_MERGED = 32
"""Files that a concept may merge: each is read whole."""


def _several(lora: Any) -> Any:
    """Several files as a tuple; what each says is read here, so that a wrong weight is noticed at once."""
    if not isinstance(lora, list | tuple):
        return lora
    if not 2 <= len(lora) <= MOST_MERGED or not all(isinstance(source, str) for source in lora):
        raise ValueError(
            f"expected one file, or a list of 2 to {MOST_MERGED} that are merged, such as [cat.safetensors, "
            f"style.safetensors:0.7], not {lora}"
        )
    weights = [weight for _, weight in weighted(tuple(lora))]
    if not any(weights):
        raise ValueError("every weight is 0; there is nothing to merge")
    return tuple(lora)


ImageFile = Annotated[str, Field(pattern=r"(?i)\.(png|jpe?g|webp|bmp)$")]
"""The path of an image."""

MOST_REFERENCES = 16
"""Reference images of a scene: each adds its tokens to every pass."""

References = Annotated[
    tuple[ImageFile, ...],
    BeforeValidator(lambda given: (given,) if isinstance(given, str) else given),
    Field(max_length=MOST_REFERENCES),
]
"""Paths of reference images; one alone may be given without a list."""

BoxOrMask = Annotated[
    Annotated[Region, Tag("box")] | Annotated[Fractions, Tag("fractions")] | Annotated[MaskFile, Tag("mask")],
    Discriminator(_kind),
    BeforeValidator(region_of),
]


def _scales(scales: Any) -> Any:
    """Scales by name: a mapping, or text such as "cat:1,dog:0.5"."""
    if not isinstance(scales, str):
        return scales
    pairs = [part.rpartition(":") for part in scales.split(",")]
    return {name.strip(): scale for name, _, scale in pairs}


class ControlFile(_Frozen):
    """A control image and the model that reads it (`Control`).

    Attributes:
        model: A ControlNet or T2I-Adapter: a folder as diffusers saves it, or a hub repository.
        image: Path of the control image, as large as the image that is made.
        scale: Factor on its output.
        start: It acts from this part of the steps on.
        end: It acts until this part of the steps.
        regions: By name of a concept, the scale inside its region.
    """

    model: Annotated[str, Field(min_length=1)]
    image: ImageFile
    scale: float = 1.0
    start: Annotated[float, Field(ge=0, lt=1)] = 0.0
    end: Annotated[float, Field(gt=0, le=1)] = 1.0
    regions: Annotated[Mapping[str, float], BeforeValidator(_scales)] = Field(default_factory=dict)


class IPAdapterFile(_Frozen):
    """An IP-Adapter and the image that it reads.

    Attributes:
        model: A folder or hub repository.
        subfolder: Where the weights are in it.
        weight_name: The file of the weights.
        image_encoder: The folder of the image encoder, in the subfolder; a path with "/" begins at `model`.
        image: Path of the image.
        scale: Factor on what is read of the image.
        region: Where it acts: a box or a mask; None is everywhere.
    """

    model: Annotated[str, Field(min_length=1)]
    subfolder: str = ""
    weight_name: Annotated[str, Field(pattern=r"\.safetensors$")]
    image_encoder: str = "image_encoder"
    image: ImageFile
    scale: float = 1.0
    region: BoxOrMask | None = None


class Start(_Frozen):
    """The image that a scene starts from, without one it is text-to-image; and further images that guide it.

    Attributes:
        image: Path of the image that it starts from.
        mask_image: Where the image is repainted: the path of a mask image (white = repainted), or a box; None means
            everywhere.
        strength: The share of the steps that are run; None is diffusers' default for the model.
        padding_mask_crop: Pixels around the mask; only that part is painted, at the size of the scene.
        paste_original: Whether pixels outside of the mask are copied from the image; None means no.
        references: Paths of the images that the model reads beside the prompt, in their order; they go with
            text-to-image, and with models that read them.
        controls: Control images with their models.
        ip_adapters: IP-Adapters with their images.
    """

    image: ImageFile | None = None
    mask_image: BoxOrMask | None = None
    strength: Annotated[float, Field(gt=0, le=1)] | None = None
    padding_mask_crop: Annotated[int, Field(ge=0)] | None = None
    paste_original: bool | None = None
    references: References = ()
    controls: tuple[ControlFile, ...] = ()
    ip_adapters: tuple[IPAdapterFile, ...] = ()

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.image is None and self.start:
            raise ValueError(f"{' and '.join(self.start)} needs an image: give image as well")
        if self.mask_image is None and (self.padding_mask_crop is not None or self.paste_original):
            raise ValueError("padding_mask_crop and paste_original need a mask: give mask_image as well")
        if self.image is not None and self.references:
            raise ValueError("an image to start from and reference images cannot be combined; give one of the two")
        return self

    @property
    def start(self) -> dict[str, Any]:
        """The fields of the start image that are given, as arguments of a call."""
        names = [name for name in Start.model_fields if name not in ("references", "controls", "ip_adapters")]
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def image_files(self) -> dict[str, str]:
        """The paths of all images, by the name of their field."""
        paths = {name: value for name, value in self.start.items() if name in ("image", "mask_image")}
        paths |= {f"references.{number}": path for number, path in enumerate(self.references)}
        for field in ("controls", "ip_adapters"):
            for number, entry in enumerate(getattr(self, field)):
                paths[f"{field}.{number}.image"] = entry.image
                paths[f"{field}.{number}.region"] = getattr(entry, "region", None)
        return {name: path for name, path in paths.items() if isinstance(path, str) and not path.startswith(URI_PREFIX)}


class Concept(_Frozen):
    """A subject or style and its LoRA.

    In a call, fields that are None are taken from the loaded concept of the same name.

    Attributes:
        name: What the concept is called.
        lora: A safetensors file, a folder or hub repository with one, or `playground:NAME`. Not needed where the
            concept has been loaded by `load_concept` or `load_lora_weights`. Several files are merged into one LoRA
            when they are loaded, each with its weight if that is not 1: ("cat.safetensors", "style.safetensors:0.7").
        merge: How several files are merged: a name of `pipelines.merging.MERGERS`; None is their exact sum, "cat".
        trigger: The rare word or words that the LoRA was trained with: "sks". If it ends with the class word, that is
            taken off: "sks cat" becomes "sks".
        class_word: The noun after the trigger: "cat".
        weight: Factor on the whole LoRA; 1 by default. It may change over the steps: a list of numbers for equal parts
            of them, or text: "0:1,0.5:0" is 1 in the first half and 0 in the second, "0:1..0.5:0.4" falls evenly to
            0.4 until the middle, "1..0.4" to the last step. Points are fractions of the steps, or step numbers if one
            is above 1.
        blocks: Further factors by block of the model, {"down": 0.5, "up.1": 0}; the longest name counts,
            and "text" means the text encoders.
        any_weight: Whether `weight`, `blocks` and weights of files may be beyond 10 and -10.
        region: Where the concept may appear: a box in pixels or in fractions of the image, or a mask (white = inside):
            a path, a PIL image, an array or a tensor; None leaves it to the method.
        prompt: The text of the region, for methods that read a text per concept; it contains the trigger. None
            derives it from the scene's prompt.
        negative_prompt: What to avoid in the region; None means the scene's.
        role: "subject"; "style" for a concept that acts everywhere and has no region; or "bystander" for a subject of
            the base model, without a LoRA, which is named by its class word: LoRAs of others keep off its region. None
            means a subject.
        references: Whether the LoRA acts on the cells of reference images, too, as strongly as anywhere in the image:
            for LoRAs that were trained to read them. None means that the file says so, as those of
            `lora-compose train --references` do; otherwise no.
        alpha: The alpha that the LoRA was trained with, for files that do not contain it; the change is scaled by
            alpha / rank.
    """

    name: Annotated[str, Field(min_length=1)]
    lora: Annotated[LoraFiles, BeforeValidator(_several)] = None
    merge: str | None = None
    trigger: str | None = None
    class_word: str | None = None
    weight: Annotated[Weight, BeforeValidator(read_weight)] | None = None
    blocks: Annotated[dict[str, float] | None, BeforeValidator(read_blocks)] = None
    any_weight: bool | None = None
    region: BoxOrMask | None = None
    prompt: Annotated[str, Field(min_length=1)] | None = None
    negative_prompt: str | None = None
    role: Literal["subject", "style", "bystander"] | None = None
    references: bool | None = None
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _keeps_words_apart(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        if data.get("role") == "bystander" and not data.get("class_word"):
            return {**data, "class_word": data.get("name")}
        return with_bare_trigger(data)

    @model_validator(mode="after")
    def _merges_several(self) -> Self:
        if self.merge is not None and isinstance(self.lora, str):
            raise ValueError(
                f"the concept {self.name!r} merges one file; give lora a list of several, or leave out merge"
            )
        return self

    @model_validator(mode="after")
    def _weighs_sanely(self) -> Self:
        if not self.any_weight:
            check_sane(self.weight, self.blocks, [weight for _, weight in weighted(self.lora)])
        return self

    @model_validator(mode="after")
    def _styles_are_everywhere(self) -> Self:
        _check_style(self)
        return self

    @model_validator(mode="after")
    def _bystanders_have_no_lora(self) -> Self:
        given = [name for name in _OF_A_LORA if getattr(self, name) not in (None, "", 0.0)]
        if self.is_bystander and given:
            raise ValueError(
                f"the concept {self.name!r} is a bystander, which has no LoRA and is named by its class word: leave "
                f"out {' and '.join(given)}, or its role"
            )
        return self

    @property
    def is_style(self) -> bool:
        """Whether the concept is a style."""
        return self.role == "style"

    @property
    def is_bystander(self) -> bool:
        """Whether the concept is a subject of the base model, without a LoRA."""
        return self.role == "bystander"

    @property
    def head_noun(self) -> str:
        """The last word of the class word, in lower case: "cat" of "old cat"; empty without one."""
        return head_noun_of(self.class_word)

    @property
    def phrase(self) -> str:
        """Trigger and class word: "sks cat"."""
        return " ".join(word for word in (self.trigger, self.class_word) if word)

    def completed(self, known: "Concept") -> "Concept":
        """This concept, whose missing fields are taken from another.

        Raises:
            ValueError: If one of the two is a style, and the other has a region.
        """
        given = {name: value for name, value in self if value is not None}
        words = {name: given.get(name, getattr(known, name)) for name in ("trigger", "class_word")}
        made = known.model_copy(update={**given, **with_bare_trigger(words)})
        _check_style(made)  # copies are not validated
        return made


_OF_A_LORA = ("lora", "merge", "trigger", "weight", "blocks", "any_weight", "references", "alpha")
"""Fields that a concept without a LoRA has no use for."""


def _check_style(concept: Concept) -> None:
    """Raises ValueError for a style with a region."""
    if concept.is_style and concept.region is not None:
        raise ValueError(
            f"the concept {concept.name!r} is a style, which acts everywhere: leave out its region or its role"
        )


def with_bare_trigger(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a concept whose trigger lacks the class word at its end: "alc" of "alc woman" and of "alc_woman"."""
    trigger, noun = fields.get("trigger"), fields.get("class_word")
    if isinstance(trigger, str) and isinstance(noun, str):
        return {**fields, "trigger": without_ending(trigger, noun)}
    return dict(fields)


def head_noun_of(class_word: str | None) -> str:
    """The last word of a class word, in lower case: "cat" of "old cat" and of "old_cat"; empty without one."""
    return spaced(class_word or "").rpartition(" ")[2]


def beside_its_class(subjects: Sequence[Concept]) -> bool:
    """Whether a bystander shares its noun with another subject: my cat, and a cat."""
    nouns = [subject.head_noun for subject in subjects]
    return any(subject.is_bystander and nouns.count(subject.head_noun) > 1 for subject in subjects)


ConceptNames = Sequence[str | Concept | Mapping[str, Any]] | Mapping[str, Any]
"""A concept set as it is given: names, concepts or their fields in a list; or by name weights, boxes and fields."""


def concepts_of(given: Any) -> tuple[Concept, ...]:
    """The concepts of one set: names, `Concept` objects or their fields in a list; or by name (`fields_of`).

    Raises:
        ValueError: For what is no concept set, unusable fields, and names given twice.
    """
    if isinstance(given, str | Concept) or is_fields(given):
        raise ValueError(
            f"concepts must be a list of names, Concepts or their fields, such as ['cat', 'dog'], not {given!r}"
        )
    concepts = tuple(Concept(**concept) if isinstance(concept, Mapping) else concept for concept in as_fields(given))
    if wrong := [concept for concept in concepts if not isinstance(concept, Concept)]:
        raise ValueError(f"concepts must be a list of names, Concepts or their fields, and one is {wrong[0]!r}")
    check_names(concepts)
    return concepts


class Scene(Start):
    """Prompt, concepts and size of an image, and what it starts from.

    Attributes:
        prompt: Names every concept by its trigger.
        negative_prompt: What to avoid.
        concepts: The concept set: a list, or fields, weights and boxes by name.
        width: Width of the image in pixels; None is that of `image`, if there is one and nothing is cropped, or the
            model's own.
        height: Height of the image in pixels; None as for the width.
    """

    prompt: Annotated[str, Field(min_length=1)]
    negative_prompt: str = ""
    concepts: Annotated[tuple[Concept, ...], BeforeValidator(as_fields)] = ()
    width: Annotated[int, Field(gt=0)] | None = None
    height: Annotated[int, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        check_names(self.concepts)
        for concept in self.concepts:
            if self.image is None:  # else boxes are in its coordinates; files are looked at when the scene is used
                check_box(concept, self.width, self.height)
        return self


class Run(_Frozen):
    """All that reproduces an image: scene, model, method with settings, scheduler, steps, guidance and seed.

    Attributes:
        scene: The scene.
        model: A folder, a checkpoint file, a hub repository or `playground`.
        method: Name of the method; None chooses.
        settings: The method's settings that differ from its defaults.
        scheduler: Class name of a diffusers scheduler; None keeps the model's.
        steps: Number of denoising steps; the default is that of the small models that come with lora-compose.
        guidance_scale: Classifier-free guidance; 1 or less is none; the default as for `steps`.
        seed: Seed of the start noise.
        dtype: Precision of the model.
        quantize: nf4, int8, fp8, or a file of the denoiser in fewer bits; None is the model as it is.
        device: Device; None chooses one. A seed gives the same start noise on every device.
    """

    scene: Scene
    model: str
    method: str | None = None
    settings: Mapping[str, Any] = Field(default_factory=dict)
    scheduler: str | None = None
    steps: Annotated[int, Field(gt=0)] = 25
    guidance_scale: float = 5.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    dtype: Annotated[str, Field(pattern="^(float32|float16|bfloat16)$")] = "float32"
    quantize: str | None = None
    device: str | None = None


def check_names(concepts: tuple[Concept, ...]) -> None:
    """Raises ValueError if two concepts share a name."""
    names = [concept.name for concept in concepts]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"concept names must differ, but {', '.join(map(repr, twice))} stands twice")


def check_box(concept: Concept, width: int | None, height: int | None) -> None:
    """Raises ValueError if a concept's box leaves the canvas; sizes that are None are not checked, and no mask is."""
    if concept.region is None or isinstance(concept.region, str) or is_fractions(concept.region):
        return
    _, _, right, bottom = concept.region
    if (width is not None and right > width) or (height is not None and bottom > height):
        raise ValueError(
            f"the region {concept.region} of concept {concept.name!r} leaves the canvas of {width} x {height} pixels"
        )
