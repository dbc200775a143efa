"""What users may write for the concepts of an image: names, fields, or weights and boxes by name; also as plain JSON.

Nothing here is checked beyond its shape: `Concept` does that.
"""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from lora_compose.pipelines.scene.mask_images import is_fractions
from lora_compose.pipelines.scene.strength import SANE_WEIGHT, is_box, largest_factor
from lora_compose.pipelines.support.numbers import as_plain


def is_fields(given: Any) -> bool:
    """Whether this is one concept by its fields, {"name": "cat", "lora": "cat.safetensors"}."""
    return isinstance(given, Mapping) and isinstance(given.get("name"), str)


def is_set(given: Any) -> bool:
    """Whether this is a concept set, a list or by name, rather than one concept of a set."""
    return isinstance(given, list | tuple) or (isinstance(given, Mapping) and not is_fields(given))


def fields_of(name: str, given: Any) -> dict[str, Any]:
    """The fields that `concepts={name: given}` means: a weight or a schedule of weights, a box, or fields.

    Four numbers may also be written as text, as boxes are on the command line: "0,0,64,128".

    Raises:
        ValueError: For four numbers that may be a box and may be weights, and for fields with another name.
    """
    if isinstance(given, Mapping):
        if given.get("name", name) != name:
            raise ValueError("a concept that is given by name has another name among its fields; leave that out")
        return {**given, "name": name}
    given = _numbers(as_plain(given))
    box, what = given, "a box"
    if not _is_region(given):
        box, what = _box_of_sides(given), "left, top, width and height of a box"
    if box is None:
        return {"name": name, "weight": given}
    if largest_factor(given) <= SANE_WEIGHT:
        raise ValueError(
            f"concepts={{{name!r}: {given}}} may be {what}, or the weights of four parts of the steps; write "
            f"Concept(name={name!r}, region={box}) or Concept(name={name!r}, weight={list(given)})"
        )
    return {"name": name, "region": given}


def _is_region(given: Any) -> bool:
    """Whether this is a box in fractions of the image, or in whole pixels."""
    return is_box(given) and (is_fractions(given) or all(side % 1 == 0 for side in given))


def _numbers(given: Any) -> Any:
    """The numbers of a text such as "0,0,64,128"; anything else stays as it is."""
    if isinstance(given, str) and given.count(",") == 3:
        with suppress(ValueError):  # it is a schedule with points, or for `Concept` to refuse
            return tuple(float(number) if "." in number else int(number) for number in given.split(","))
    return given


def _box_of_sides(given: Any) -> tuple[float, ...] | None:
    """The box in fractions of the image that left, top, width and height mean; None if they mean none."""
    if not isinstance(given, list | tuple) or len(given) != 4 or any(not isinstance(it, int | float) for it in given):
        return None
    left, top, width, height = given
    box = left, top, round(left + width, 6), round(top + height, 6)
    return box if is_box(box) and is_fractions(box) else None


def as_fields(concepts: Any) -> Any:
    """A concept set as a list of fields; anything else stays as it is. ValueError as `fields_of`, or without a name."""
    if isinstance(concepts, Mapping):
        if isinstance(concepts.get("lora"), str | list | tuple) and not is_fields(concepts):
            raise ValueError("a concept's fields need its name: {'name': 'cat', 'lora': 'cat.safetensors'}")
        return [fields_of(name, given) for name, given in concepts.items()]
    if isinstance(concepts, list | tuple):
        return [{"name": concept} if isinstance(concept, str) else concept for concept in concepts]
    return concepts
