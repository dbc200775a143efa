"""Requests to a server: one image each, with limits on everything that costs time or memory.

Lists are measured before their entries are read, and no message repeats what was sent.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from lora_compose.compose.batch.settings import LAST_SEED
from lora_compose.compose.support.frozen import Frozen
from lora_compose.compose.support.names import METHODS
from lora_compose.pipelines.concepts.tags import read_tags
from lora_compose.pipelines.scene.given import as_fields, fields_of
from lora_compose.pipelines.scene.scene import Concept, Fractions, Region, check_box
from lora_compose.pipelines.support.spelling import did_you_mean

MOST_CONCEPTS, MOST_WEIGHT, MOST_NAME = 8, 10.0, 200
MOST_CHARACTERS = 2000
MOST_SIDE = 2**16
"""Pixels of the longer side; how large an image may be is `Limits.pixels`."""

AUTO = "auto"
"""`"concepts": "auto"`: the LoRAs that the prompt names."""

_MOST_FIELDS = 32  # of a request or a concept, known or not
_MOST_MESSAGES, _MOST_LETTERS = 5, 300


def _four_sides(given: Any) -> Any:
    if not isinstance(given, list | tuple) or len(given) != 4:
        raise ValueError("expected [left, top, right, bottom] in pixels or in fractions of the image")
    if any(isinstance(side, int | float) and not 0 <= side <= MOST_SIDE for side in given):
        raise ValueError(f"its sides are from 0 to {MOST_SIDE}")
    return given


class Limits(Frozen):
    """The most that a request may ask for."""

    pixels: Annotated[int, Field(gt=0)] = 1024 * 1024
    steps: Annotated[int, Field(gt=0)] = 50


class _Asked(Frozen):
    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, given: Any) -> Any:
        if isinstance(given, dict) and len(given) > _MOST_FIELDS:
            raise ValueError(f"too many fields; there are {', '.join(cls.model_fields)}")
        return given


class RequestedConcept(_Asked):
    """A LoRA of the server, and how it acts.

    Attributes:
        name: Of the LoRA, or any other one for a bystander.
        weight: Factor on it; None is 1.
        region: A box in pixels or in fractions of the image; None is none.
        role: A style acts everywhere; a bystander is no LoRA, but a subject without one, named by its class word.
        class_word: Of a bystander; None is its name. A LoRA has its own.
    """

    name: Annotated[str, Field(min_length=1, max_length=MOST_NAME)]
    weight: Annotated[float, Field(ge=-MOST_WEIGHT, le=MOST_WEIGHT)] | None = None
    region: Annotated[Region | Fractions, BeforeValidator(_four_sides)] | None = None
    role: Literal["subject", "style", "bystander"] | None = None
    class_word: Annotated[str, Field(min_length=1, max_length=MOST_NAME)] | None = None

    @model_validator(mode="after")
    def _loras_have_words(self) -> Self:
        if self.class_word is not None and self.role != "bystander":
            raise ValueError("class_word is for bystanders; a LoRA has its own")
        return self

    @property
    def concept(self) -> Concept:
        """The concept of a call."""
        return Concept(**self.model_dump(exclude_none=True))


_Listed = Annotated[tuple[RequestedConcept, ...], Field(max_length=MOST_CONCEPTS)]
_LIST = "list"


class ImageRequest(_Asked):
    """One image.

    Attributes:
        prompt: Names each concept by its trigger.
        negative_prompt: What to avoid.
        concepts: LoRAs of the server by name, or with weight and region, as a list or by name; "auto" are those that
            the prompt names. Tags in the prompt, `<lora:cat:0.8>`, add to them.
        method: How they are fused; None is chosen as in Python.
        width: In pixels; None is the model's own.
        height: In pixels; None is the model's own.
        steps: Denoising steps; None is the server's default.
        guidance_scale: Classifier-free guidance; 1 or less is none; None is the server's default.
        seed: Of the start noise.
    """

    prompt: Annotated[str, Field(min_length=1, max_length=MOST_CHARACTERS)]
    negative_prompt: Annotated[str, Field(max_length=MOST_CHARACTERS)] = ""
    concepts: Annotated[
        Annotated[_Listed, Tag(_LIST)] | Annotated[Literal["auto"], Tag(AUTO)],
        Discriminator(lambda given: AUTO if given == AUTO else _LIST),
    ] = ()
    method: str | None = None
    width: Annotated[int, Field(gt=0, le=MOST_SIDE)] | None = None
    height: Annotated[int, Field(gt=0, le=MOST_SIDE)] | None = None
    steps: Annotated[int, Field(gt=0)] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=100)] | None = None
    seed: Annotated[int, Field(ge=0, le=LAST_SEED)] = 0

    @field_validator("concepts", mode="before")
    @classmethod
    def _by_name(cls, given: Any) -> Any:
        """`["cat"]` is `[{"name": "cat"}]`, and `{"cat": 0.8}` is `[{"name": "cat", "weight": 0.8}]`.

        Each entry may become an error, so their number is looked at first.
        """
        if given == AUTO:
            return given
        if not isinstance(given, list | tuple | dict):
            raise ValueError(
                'expected a list of names, or of objects with a name, or weights or boxes by name, or "auto"'
            )
        if len(given) > MOST_CONCEPTS:
            raise ValueError(f"there are {len(given)} concepts; at most {MOST_CONCEPTS}")
        if isinstance(given, dict):
            return [_named(name, value) for name, value in given.items()]
        return as_fields(given)

    @field_validator("method")
    @classmethod
    def _known(cls, method: str | None) -> str | None:
        if method is not None and method not in METHODS:
            raise ValueError(f"unknown method; there are {', '.join(METHODS)}")
        return method

    @model_validator(mode="after")
    def _fits(self) -> Self:
        given = () if self.concepts == AUTO else self.concepts
        named = (*given, *_tagged(self.prompt)[1])
        if self.concepts == AUTO:
            if named:
                raise ValueError('"auto" finds the LoRAs by the prompt; leave out its tags, or name all concepts')
            return self
        if self.method is not None and not named:
            raise ValueError("a method needs concepts")
        if len(named) > MOST_CONCEPTS:
            raise ValueError(f"there are {len(named)} concepts, tags in the prompt included; at most {MOST_CONCEPTS}")
        if len({concept.name for concept in named}) < len(named):
            raise ValueError(
                "a name stands twice in concepts and tags of the prompt; name a LoRA once, and a bystander otherwise"
            )
        for i, concept in enumerate(named):
            try:
                check_box(concept.concept, self.width, self.height)
            except ValueError:
                raise ValueError(f"concepts[{i}].region leaves the canvas of the image") from None
        return self

    def resolved(self, width: int, height: int, steps: int, guidance_scale: float) -> "ImageRequest":
        """The request with the server's defaults filled in, and tags as concepts; the method may still be open."""
        update: dict[str, Any] = {
            "width": self.width or width, "height": self.height or height, "steps": self.steps or steps,
            "guidance_scale": guidance_scale if self.guidance_scale is None else self.guidance_scale,
        }  # fmt: skip
        if self.concepts != AUTO:
            prompt, tagged = _tagged(self.prompt)
            update |= {"prompt": prompt, "concepts": (*self.concepts, *tagged)}
        return self.model_copy(update=update)

    @property
    def shape(self) -> tuple[Any, ...]:
        """Requests with an equal shape are batched."""
        return *self.kind[:3], self.guidance_scale, self.method, bool(self.negative_prompt)

    @property
    def kind(self) -> tuple[Any, ...]:
        """Requests of one kind take about equally long."""
        return self.width, self.height, self.steps, (self.guidance_scale or 0) > 1, self.method


def _named(name: str, value: Any) -> dict[str, Any]:
    """A concept by name, as in Python (`fields_of`); but a list is a box, since no weight is one here."""
    return {"name": name, "region": value} if isinstance(value, list) else fields_of(name, value)


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
    place = list(error["loc"][1:])  # the first is "body"
    if place[:2] == ["concepts", _LIST]:  # how they were read, no field
        del place[1]
    text = str(error.get("ctx", {}).get("error", error["msg"]))
    if error["type"] == "extra_forbidden":
        kind = RequestedConcept if "concepts" in place[:-1] else ImageRequest
        near = did_you_mean(str(place.pop())[:MOST_NAME], kind.model_fields)
        text = f"there is an unknown field; fields are {', '.join(kind.model_fields)}{near}"
    where = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place).removeprefix(".")
    return short(f"{where}: {text}" if where else text)
