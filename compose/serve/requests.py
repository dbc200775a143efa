"""Requests to a server: one image each, with limits on everything that costs time or memory.

Lists are measured before their entries are read, and no message repeats what was sent.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from lora_compose.compose.batch.settings import LAST_SEED
from lora_compose.compose.support.names import METHODS
from lora_compose.pipelines.concepts.tags import read_tags
from lora_compose.pipelines.scene.scene import Concept, Fractions, Region, check_box
from lora_compose.pipelines.support.spelling import did_you_mean

MOST_CONCEPTS, MOST_WEIGHT, MOST_NAME = 8, 10.0, 200
MOST_CHARACTERS = 2000
MOST_SIDE = 2**16
"""Pixels of the longer side; how large an image may be is `Limits.pixels`."""

REASONS = {"regional": "every subject has a region", "merge": "not every subject has a region"}
"""Why a request that names no method is made by one (`ImageRequest.resolved`)."""

_MOST_FIELDS = 32  # of a request or a concept, known or not
_MOST_MESSAGES, _MOST_LETTERS = 5, 300


def _four_sides(given: Any) -> Any:
    if not isinstance(given, list | tuple) or len(given) != 4:
        raise ValueError("expected [left, top, right, bottom] in pixels or in fractions of the image")
    if any(isinstance(side, int | float) and not 0 <= side <= MOST_SIDE for side in given):
        raise ValueError(f"its sides are from 0 to {MOST_SIDE}")
    return given


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Limits(_Frozen):
    """The most that a request may ask for."""

    pixels: Annotated[int, Field(gt=0)] = 1024 * 1024
    steps: Annotated[int, Field(gt=0)] = 50


class _Asked(_Frozen):
    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, given: Any) -> Any:
        if isinstance(given, dict) and len(given) > _MOST_FIELDS:
            raise ValueError(f"too many fields; there are {', '.join(cls.model_fields)}")
        return given


class RequestedConcept(_Asked):
    """A LoRA of the server, and how it acts.

    Attributes:
        name: Of the LoRA.
        weight: Factor on it; None is 1.
        region: A box in pixels or in fractions of the image; None is none.
        role: A style acts everywhere.
    """

    name: Annotated[str, Field(min_length=1, max_length=MOST_NAME)]
    weight: Annotated[float, Field(ge=-MOST_WEIGHT, le=MOST_WEIGHT)] | None = None
    region: Annotated[Region | Fractions, BeforeValidator(_four_sides)] | None = None
    role: Literal["subject", "style"] | None = None

    @property
    def concept(self) -> Concept:
        """The concept of a call."""
        return Concept(**self.model_dump(exclude_none=True))


class ImageRequest(_Asked):
    """One image.

    Attributes:
        prompt: Names each concept by its trigger.
        negative_prompt: What to avoid.
        concepts: LoRAs of the server by name, or with weight and region; tags in the prompt, `<lora:cat:0.8>`, add to
            them.
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
    width: Annotated[int, Field(gt=0, le=MOST_SIDE)] | None = None
    height: Annotated[int, Field(gt=0, le=MOST_SIDE)] | None = None
    steps: Annotated[int, Field(gt=0)] = 25
    guidance_scale: Annotated[float, Field(ge=0, le=100)] = 5.0
    seed: Annotated[int, Field(ge=0, le=LAST_SEED)] = 0

    @field_validator("concepts", mode="before")
    @classmethod
    def _by_name(cls, given: Any) -> Any:
        """`["cat"]` is `[{"name": "cat"}]`. Each entry may become an error, so their number is looked at first."""
        if not isinstance(given, list | tuple):
            raise ValueError("expected a list of names, or of objects with a name")
        if len(given) > MOST_CONCEPTS:
            raise ValueError(f"there are {len(given)} concepts; at most {MOST_CONCEPTS}")
        return [{"name": concept} if isinstance(concept, str) else concept for concept in given]

    @field_validator("method")
    @classmethod
    def _known(cls, method: str | None) -> str | None:
        if method is not None and method not in METHODS:
            raise ValueError(f"unknown method; there are {', '.join(METHODS)}")
        return method

    @model_validator(mode="after")
    def _fits(self) -> Self:
        named = (*self.concepts, *_tagged(self.prompt)[1])
        if self.method is not None and not named:
            raise ValueError("a method needs concepts")
        if len(named) > MOST_CONCEPTS:
            raise ValueError(f"there are {len(named)} concepts, tags in the prompt included; at most {MOST_CONCEPTS}")
        if len({concept.name for concept in named}) < len(named):
            raise ValueError("a LoRA stands twice in concepts and tags of the prompt; name it once")
        for i, concept in enumerate(named):
            try:
                check_box(concept.concept, self.width, self.height)
            except ValueError:
                raise ValueError(f"concepts[{i}].region leaves the canvas of the image") from None
        return self

    def resolved(self, width: int, height: int) -> "ImageRequest":
        """The request with all defaults filled in, and tags as concepts."""
        prompt, tagged = _tagged(self.prompt)
        concepts = (*self.concepts, *tagged)
        placed = all(concept.region is not None or concept.role == "style" for concept in concepts)
        method = self.method or ("regional" if placed else "merge")
        return self.model_copy(
            update={
                "prompt": prompt, "concepts": concepts, "width": self.width or width, "height": self.height or height,
                "method": method if concepts else None,
            }
        )  # fmt: skip

    @property
    def shape(self) -> tuple[Any, ...]:
        """Requests with an equal shape are batched."""
        return self.width, self.height, self.steps, self.guidance_scale, self.method

    @property
    def kind(self) -> tuple[Any, ...]:
        """Requests of one kind take about equally long."""
        return self.width, self.height, self.steps, self.guidance_scale > 1, self.method


def _tagged(prompt: str) -> tuple[str, tuple[RequestedConcept, ...]]:
    """A prompt without its tags, and the concepts that they name; they have the limits of all others."""
    try:
        plain, weights = read_tags(prompt)
    except ValueError:
        raise ValueError("a tag in the prompt is not closed, has no number, or names a LoRA twice: "
                         "write <lora:NAME:0.8>") from None  # fmt: skip
    for name, weight in weights.items():
        if not 1 <= len(name) <= MOST_NAME or not abs(weight) <= MOST_WEIGHT:  # NaN is not <= either
            raise ValueError(f"a tag in the prompt has no name, or a weight beyond {MOST_WEIGHT:g}")
    return plain, tuple(RequestedConcept(name=name, weight=weight) for name, weight in weights.items())


def short(text: str) -> str:
    """A message of bounded length, without control characters."""
    text = text if len(text) <= _MOST_LETTERS else f"{text[:_MOST_LETTERS]} ..."
    return "".join(letter if letter.isprintable() else " " for letter in text)


def reasons(errors: Sequence[Mapping[str, Any]]) -> str:
    """The errors of a request in words: where, and what was expected; nothing that was sent."""
    lines = [_reason(error) for error in errors[:_MOST_MESSAGES]]
    more = len(errors) - len(lines)
    return "; ".join([*lines, *([f"and {more} more"] if more else [])])


def _reason(error: Mapping[str, Any]) -> str:
    place = list(error["loc"])[1:]  # the first is "body"
    text = str(error.get("ctx", {}).get("error", error["msg"]))
    if error["type"] == "extra_forbidden":
        kind = RequestedConcept if "concepts" in place[:-1] else ImageRequest
        near = did_you_mean(str(place.pop())[:MOST_NAME], kind.model_fields)
        text = f"there is an unknown field; fields are {', '.join(kind.model_fields)}{near}"
    where = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place).removeprefix(".")
    return short(f"{where}: {text}" if where else text)
