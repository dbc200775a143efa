"""The controls of a method, derived from the fields of its settings, so that a new method needs no page code."""

import dataclasses
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from lora_compose.compose.files.text import parse_value
from lora_compose.compose.generate.method_list import field_texts
from lora_compose.compose.page.labels import label_of, setting_label
from lora_compose.pipelines.methods import METHODS, make_method

Kind = Literal["choice", "switch", "whole", "number", "words", "yaml"]


@dataclass(frozen=True)
class Control:
    """One setting of a method.

    Attributes:
        kind: What sets it: one of several values, on or off, a whole number, a number, words as they are, or
            text read as YAML.
        choices: The values of a "choice".
        help: The field's name and its text in the settings' docstring.
    """

    name: str
    label: str
    kind: Kind
    default: Any
    choices: tuple[Any, ...] = ()
    help: str = ""

    def shown(self, value: Any) -> Any:
        """A value as its control takes it: text for what has no control of its own, everything else as it is."""
        if self.kind == "words":
            return value or ""
        if self.kind != "yaml":
            return value
        return json.dumps(_plain(value), ensure_ascii=False) if value or value == 0 else ""  # JSON is YAML

    def value(self, shown: Any) -> Any:
        """The value that a control shows; empty text is the default.

        Raises:
            ValueError: For text that cannot be read as a value.
        """
        if self.kind == "words":
            return shown.strip() or self.default
        if self.kind != "yaml":
            return shown
        return parse_value(shown) if shown.strip() else self.default


def controls(method: str) -> tuple[Control, ...]:
    """The controls of a method, in the order of its fields."""
    kind = METHODS[method]
    hints, texts = get_type_hints(kind), field_texts(kind)
    defaults = kind()
    return tuple(
        _control(method, field.name, hints[field.name], getattr(defaults, field.name), texts.get(field.name, ""))
        for field in dataclasses.fields(kind)  # pyright: ignore[reportArgumentType]
        if field.init
    )


def sentence(method: str) -> str:
    """What a method does, in few sentences; for a method without a label that of its docstring."""
    return label_of(method).sentence or (inspect.getdoc(METHODS[method]) or "").partition("\n")[0]


def changed(method: str, shown: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a method's controls change. Raises ValueError, which says why, if it does not take them."""
    values = {control.name: control.value(shown[control.name]) for control in controls(method) if control.name in shown}
    defaults = {control.name: control.default for control in controls(method)}
    different = {name: value for name, value in values.items() if _plain(value) != _plain(defaults[name])}
    make_method(method, different)
    return different


def _control(method: str, name: str, hint: Any, default: Any, text: str) -> Control:
    label, text = setting_label(method, name), f"{name}: {text}"
    if get_origin(hint) is Literal:
        return Control(name, label, "choice", default, get_args(hint), text)
    kinds: dict[Any, Kind] = {bool: "switch", int: "whole", float: "number", str: "words", str | None: "words"}
    return Control(name, label, kinds.get(hint, "yaml"), default, (), text)


def _plain(value: Any) -> Any:
    """The value in YAML's types: lists and dictionaries."""
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return dict(value) if isinstance(value, Mapping) else value
