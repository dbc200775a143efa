"""`lora-compose methods`: the methods, what they need, and their settings with defaults."""

import dataclasses
import inspect
import json
import re
from collections.abc import Mapping
from typing import Any

from lora_compose.compose.files.text import parse_value
from lora_compose.compose.support.terminal import echo
from lora_compose.pipelines.methods import METHODS, PRESETS, make_method, name_of

_WORDS = "a trigger and a class word for each subject with a LoRA, a class word for each bystander"
NEEDS: Mapping[str, str] = {
    "lora-composer": "a region for at least one subject, and a trigger for each",
    "regional": "a region for at least one subject",
    "draft": _WORDS,
    "clora": _WORDS,
    "freefuse": _WORDS,
    "tara": "a trigger for each concept",
}
"""What a method needs of the concepts; the others need nothing."""


def show_methods(method: str | None) -> None:
    """Prints all methods in a line or two each, or one with its settings."""
    if method is None:
        for name in METHODS:
            echo(f"{name}: {_summary(name)}")
            echo(f"    needs {needs_of(name)}; settings: {', '.join(_defaults(name)) or 'none'}", style="dim")
        echo(f"\nWith the authors' settings: {', '.join(PRESETS)}. One with its settings: lora-compose methods NAME")
        return
    made = make_method(method)
    name, changed = name_of(made)
    echo(f"{method}: {_summary(name)}\nneeds {needs_of(name)}")
    texts = field_texts(METHODS[name])
    for field, default in _defaults(name).items():
        value = changed.get(field, default)
        echo(f"\n--set {field}={shown(value)}", style="bold")
        echo(texts.get(field, ""))


def needs_of(name: str) -> str:
    """What a method needs of model and concepts, in words."""
    unet = ["a UNet (Stable Diffusion) or Anima"] if METHODS[name]().needs.region_attention else []
    return " and ".join([*unet, *([NEEDS[name]] if name in NEEDS else [])]) or "nothing"


def field_texts(kind: Any) -> dict[str, str]:
    """The text of each attribute in a docstring of Google's style."""
    section = (inspect.getdoc(kind) or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    fields = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", section, re.MULTILINE)
    return {name: re.sub(r"\s+", " ", text) for name, text in fields}


def shown(value: Any) -> str:
    """A value as `--set` reads it: as it is, or in JSON where that would be read as something else."""
    plain = list(value) if isinstance(value, tuple) else value
    text = str(plain)
    return text if parse_value(text) == plain else json.dumps(plain)


def _summary(name: str) -> str:
    return (inspect.getdoc(METHODS[name]) or "").partition("\n")[0]


def _defaults(name: str) -> dict[str, Any]:
    made: Any = METHODS[name]()
    return {field.name: getattr(made, field.name) for field in dataclasses.fields(made) if field.init}
