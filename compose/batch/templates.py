"""Templates of scenes: fields with placeholders, "a {animal} on {place}", that the columns of a table fill."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from lora_compose.compose.files.reading import FileError
from lora_compose.compose.files.text import parse_json

_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([A-Za-z_][\w-]*)\}")
_NUMBERS = re.compile(r"\[[-+.\d\s,eE]*\]")

OMITTED = object()


def placeholders(template: Any) -> set[str]:
    """The names of all placeholders in a template."""
    names: set[str] = set()

    def look(text: str) -> str:
        names.update(match[1] for match in _PLACEHOLDER.finditer(text) if match[1])
        return text

    _mapped(template, look)
    return names


def fill(template: Any, values: Mapping[str, Any]) -> Any:
    """A template with values in place of the names; None and "" are no value.

    A text that is only a placeholder becomes the value itself; without a value, its field is left out. A result that is
    a list of numbers, "[0, 16, 60, 112]", becomes one. "{{" and "}}" are braces. Raises ValueError if a list or mapping
    stands within a text.
    """

    def filled(text: str) -> Any:
        whole = _PLACEHOLDER.fullmatch(text)
        if whole and whole[1]:
            value = values[whole[1]]
            return OMITTED if value is None or value == "" else _typed(value)
        if not _PLACEHOLDER.search(text):
            return text
        return _typed(_PLACEHOLDER.sub(lambda match: _inserted(match, values), text))

    return _mapped(template, filled)


def _inserted(match: re.Match, values: Mapping[str, Any]) -> str:
    if match[1] is None:
        return match[0][0]
    value = values[match[1]]
    if isinstance(value, list | dict):
        raise ValueError(f"{match[1]} is a list or has fields, which cannot stand within a text")
    return "" if value is None else str(value)


def _typed(value: Any) -> Any:
    if not isinstance(value, str) or not _NUMBERS.fullmatch(value.strip()):
        return value
    try:
        return parse_json(value, "a list")
    except FileError:  # it only looks like a list of numbers
        return value


def _mapped(data: Any, change: Callable[[str], Any]) -> Any:
    if isinstance(data, str):
        return change(data)
    if isinstance(data, list):
        return [new for value in data if (new := _mapped(value, change)) is not OMITTED]
    if isinstance(data, dict):
        return {name: new for name, value in data.items() if (new := _mapped(value, change)) is not OMITTED}
    return data
