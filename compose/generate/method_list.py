"""The methods, what they need, and their settings with defaults, for `lora-compose methods` and the page.

The command shows `METHODS_FILE`, so that it need not import the methods and torch: `python -m
lora_compose.compose.generate.method_list` writes it, and a test compares both.
"""

import dataclasses
import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_compose.compose.files.text import parse_value
from lora_compose.compose.support.names import METHODS_FILE
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


def every_method() -> dict[str, Any]:
    """What the command shows: `methods` by name with summary, needs and settings (default, text); `presets` by name."""
    methods = {}
    for name in METHODS:
        texts = field_texts(METHODS[name])
        settings = {field: [shown(value), texts.get(field, "")] for field, value in _defaults(name).items()}
        methods[name] = {"summary": _summary(name), "needs": needs_of(name), "settings": settings}
    changed = {name: name_of(make_method(name))[1] for name in PRESETS}
    presets = {name: {field: shown(value) for field, value in fields.items()} for name, fields in changed.items()}
    return {"methods": methods, "presets": presets}


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


def write(path: Path = METHODS_FILE) -> Path:
    """Writes what the command shows into a file, and returns its path."""
    path.write_text(json.dumps(every_method(), indent=1) + "\n", "utf-8")
    return path


if __name__ == "__main__":
    write()
