"""Validation errors of pydantic as readable messages: where, what was expected, what was found."""

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from lora_compose.pipelines.support.spelling import did_you_mean


class FieldError(ValueError):
    """Fields that do not fit a `Concept`, `Scene` or `Run`."""

    def __init__(self, kind: type[BaseModel], error: ValidationError) -> None:
        self.messages = tuple(field_messages(kind, error))
        super().__init__(f"{kind.__name__}: {'; '.join(self.messages)}")


def field_messages(kind: type[BaseModel], error: ValidationError) -> list[str]:
    """A line for every wrong field: where, what was expected, what was found."""
    return [f"{_place(problem['loc'])}{_message(kind, problem)}" for problem in error.errors(include_url=False)]


def _place(location: tuple[int | str, ...]) -> str:
    # The variant of a region (box, mask) is not part of its position in a file.
    named = [step for i, step in enumerate(location) if i == 0 or location[i - 1] not in ("region", "mask_image")]
    steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in named)
    place = "".join(steps).removeprefix(".")
    return f"{place}: " if place else ""


def _message(kind: type[BaseModel], error: Any) -> str:
    location, problem = error["loc"], error["type"]
    if problem == "extra_forbidden":
        known = _fields(kind, location[:-1])
        return f"unknown field; fields are {', '.join(known)}{did_you_mean(str(location[-1]), known)}"
    if problem == "missing":
        return "is missing"
    if problem == "value_error":
        return str(error["ctx"]["error"])
    hint = (
        "; put it in quotes" if problem == "string_type" and not isinstance(error["input"], dict | list | None) else ""
    )
    message = error["msg"].replace("Input should be", "expected").replace("String should", "expected text that should")
    return f"{message[:1].lower()}{message[1:]}, found {shown_value(error['input'])}{hint}"


def _fields(kind: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    for step in location:
        if isinstance(step, str) and step in kind.model_fields:
            kind = next(_models_in(kind.model_fields[step].annotation), kind)
    return field_names(kind)


def field_names(kind: type[BaseModel]) -> list[str]:
    """The fields of a model, its own before inherited ones."""
    own = kind.__annotations__
    return sorted(kind.model_fields, key=lambda name: name not in own)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that a field's type mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)


def shown_value(value: Any) -> str:
    """A value in an error message, short whatever it is."""
    if isinstance(value, dict | list):
        return f"{'fields' if isinstance(value, dict) else 'a list'} ({len(value)} entries)"
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
