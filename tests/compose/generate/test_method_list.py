"""`lora-compose methods` tells the truth: what methods need, and their settings as `--set` reads them."""

import json

import pytest

from commands import call, flat
from lora_compose.compose.commands.asked import parse_settings
from lora_compose.compose.generate.method_list import NEEDS, every_method, field_texts, needs_of
from lora_compose.compose.support.names import METHODS_FILE
from lora_compose.pipelines.methods import METHODS, PRESETS, make_method


def test_every_method_is_listed_with_what_it_needs() -> None:
    told = flat(call("methods").output)
    for name in METHODS:
        assert f"{name}: " in told
        assert f"needs {needs_of(name)}; settings: " in told
    assert set(NEEDS) <= set(METHODS)
    assert needs_of("clora").startswith("a UNet (Stable Diffusion) or Anima and a trigger")
    assert needs_of("merge") == "nothing"


def test_the_list_that_is_shown_without_the_methods_is_theirs() -> None:
    """`python -m lora_compose.compose.generate.method_list` writes it anew."""
    assert json.loads(METHODS_FILE.read_text("utf-8")) == every_method()


@pytest.mark.parametrize("method", [*METHODS, *PRESETS])
def test_settings_are_shown_as_they_are_typed(method: str) -> None:
    told = call("methods", method).output
    typed = [line.removeprefix("--set ") for line in told.splitlines() if line.startswith("--set ")]
    read, own = make_method(method, parse_settings(typed)), make_method(method)
    assert json.dumps(vars(read)) == json.dumps(vars(own)), "lists and tuples are the same here"
    name = method.partition(":")[0]
    assert set(field_texts(METHODS[name])) == {line.partition("=")[0] for line in typed}
