"""Requests to a server: one image each, with limits on everything that costs time or memory."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lora_compose.compose.batch.settings import LAST_SEED
from lora_compose.compose.support.names import METHODS
from lora_compose.pipelines.scene import Concept, Fractions, Region, check_box, check_names

MOST_CONCEPTS = 8
MOST_CHARACTERS = 2000


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Limits(_Frozen):
    """The most that a request may ask for.

    Attributes:
        pixels: Width times height.
        steps: Denoising steps.
    """

    pixels: Annotated[int, Field(gt=0)] = 1024 * 1024
    steps: Annotated[int, Field(gt=0)] = 50


class RequestedConcept(_Frozen):
    """A LoRA of the server, and how it acts.

    Attributes:
        name: Of the LoRA.
        weight: Factor on it; None is 1.
        region: A box in pixels or in fractions of the image; None is none.
        role: A style acts everywhere.
    """

    name: Annotated[str, Field(min_length=1, max_length=200)]
    weight: Annotated[float, Field(ge=-10, le=10)] | None = None
    region: Region | Fractions | None = None
    role: Literal["subject", "style"] | None = None

    @property
    def concept(self) -> Concept:
        """The same for a call."""
        return Concept(**self.model_dump(exclude_none=True))


class ImageRequest(_Frozen):
    """One image.

    Attributes:
        prompt: Names each concept by its trigger.
        negative_prompt: What to avoid.
        concepts: LoRAs of the server by name, or with weight and region.
        method: How they are fused; None is `regional` if every concept but styles has a region, otherwise `merge`.
        width: In pixels; None is the model's own.
        height: In pixels; None is the model's own.
        steps: Denoising steps.
        guidance_scale: Classifier-free guidance; 1 or less is none.
        seed: Of the start noise.
    """

    prompt: Annotated[str, Field(min_length=1, max_length=MOST_CHARACTERS)]
    negative_prompt: Annotated[str, Field(max_length=MOST_CHARACTERS)] = ""
    concepts: Annotated[tuple[RequestedConcept, ...], Field(max_length=MOST_CONCEPTS)] = ()
    method: str | None = None
    width: Annotated[int, Field(gt=0)] | None = None
    height: Annotated[int, Field(gt=0)] | None = None
    steps: Annotated[int, Field(gt=0)] = 25
    guidance_scale: Annotated[float, Field(ge=0, le=100)] = 5.0
    seed: Annotated[int, Field(ge=0, le=LAST_SEED)] = 0

    @field_validator("concepts", mode="before")
    @classmethod
    def _by_name(cls, given: Any) -> Any:
        """`["cat"]` is `[{"name": "cat"}]`."""
        return [{"name": one} if isinstance(one, str) else one for one in given] if isinstance(given, list) else given

    @field_validator("method")
    @classmethod
    def _known(cls, method: str | None) -> str | None:
        if method is not None and method not in METHODS:
            raise ValueError(f"unknown method {method!r}; there are {', '.join(METHODS)}")
        return method

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.method is not None and not self.concepts:
            raise ValueError("a method needs concepts")
        concepts = tuple(one.concept for one in self.concepts)
        check_names(concepts)
        for concept in concepts:
            check_box(concept, self.width, self.height)
        return self

    def resolved(self, width: int, height: int) -> "ImageRequest":
        """The same with all defaults filled in.

        Args:
            width: The model's own.
            height: The model's own.
        """
        placed = all(one.region is not None or one.role == "style" for one in self.concepts)
        method = self.method or ("regional" if placed else "merge")
        return self.model_copy(
            update={
                "width": self.width or width, "height": self.height or height,
                "method": method if self.concepts else None,
            }
        )  # fmt: skip

    @property
    def shape(self) -> tuple[Any, ...]:
        """Requests with an equal shape are batched."""
        return self.width, self.height, self.steps, self.guidance_scale, self.method
