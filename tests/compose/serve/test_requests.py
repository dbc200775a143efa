"""Requests: what is left open, limits on everything in them, and messages that repeat nothing."""

from typing import Any

import pytest
from pydantic import ValidationError

from lora_compose.compose.serve.choosing import chosen_concepts
from lora_compose.compose.serve.requests import ImageRequest, RequestedConcept, reasons

SIZE = {"width": 64, "height": 64, "steps": 1, "guidance_scale": 4}
BEAR = {**SIZE, "prompt": "a xlo bear on grass", "concepts": ["bear"], "seed": 1}
BOXED = {**SIZE, "prompt": "a xlo bear", "concepts": [{"name": "bear", "region": [0, 0, 32, 64]}]}


def asked(given: dict[str, Any]) -> ImageRequest:
    return ImageRequest.model_validate(given).resolved(128, 128, 25, 5.0)


def test_what_is_left_open_is_resolved_from_the_request_alone() -> None:
    assert asked({"prompt": "a"}).shape == (128, 128, 25, 5.0, None, False)
    assert ImageRequest(prompt="a").resolved(64, 32, steps=4, guidance_scale=0.0).kind == (64, 32, 4, False, None)
    assert asked({**BOXED, "method": "tara"}).method == "tara"


def test_concepts_by_name_are_weights_boxes_or_fields() -> None:
    by_name = asked({**BEAR, "concepts": {"bear": 0.8, "cat": [0, 0, 32, 64], "ink": {"role": "style"}}}).concepts
    assert by_name == (
        RequestedConcept(name="bear", weight=0.8), RequestedConcept(name="cat", region=(0, 0, 32, 64)),
        RequestedConcept(name="ink", role="style"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "a" * 3000}, "2000"),
        ({"concepts": ["bear"] * 2}, "stands twice"),
        ({"concepts": [f"{i}" for i in range(9)]}, "at most 8"),
        ({"concepts": [{"name": "bear", "lora": "/etc/passwd"}]}, "lora"),
        ({"concepts": [{"name": "bear", "references": True}]}, "references"),
        ({"concepts": [{"name": "bear", "region": [0, 0, 99, 9]}]}, "leaves the canvas"),
        ({"method": "mrge"}, "unknown method"),
        ({"concepts": []}, None),
        ({"concepts": [], "method": "merge"}, "needs concepts"),
        ({"seed": -1}, "seed"),
        ({"guidance_scale": float("nan")}, "guidance"),
        ({"guidance_scale": float("inf")}, "guidance"),
        ({"prompt": "\ud800"}, "unicode"),
        ({"width": 10**400}, "65536"),
        ({"concepts": [{"name": "bear", "weight": 1e30}]}, "10"),
        ({"concepts": [{"name": "bear", "region": [0, 0, float("nan"), 9]}]}, "sides"),
        ({"concepts": [{"name": "bear", "region": [1] * 30_000}]}, "expected .left, top"),
        ({"prompt": "a <lora:bear:1>"}, "stands twice"),
        ({"prompt": "a <lora:fox:1e30>"}, "beyond 10"),
        ({"prompt": "a <lora:fox:-11>"}, "beyond 10"),
        ({"prompt": "a <lora:fox:1e400>"}, "beyond 10"),
        ({"prompt": "a <lora:fox:nan>"}, "beyond 10"),
        ({"prompt": "a <lora:fox"}, "not closed"),
        ({"prompt": "a" + "".join(f"<lora:{i}:1>" for i in range(8))}, "there are 9 concepts"),
    ],
)
def test_requests_are_bounded(change: dict[str, Any], expected: str | None) -> None:
    if expected is None:
        asked({**BEAR, **change})
        return
    with pytest.raises(ValidationError, match=expected):
        asked({**BEAR, **change})


def test_tags_are_concepts() -> None:
    tagged = asked({**SIZE, "prompt": "a xlo bear <lora:bear:0.5>, <lora:robot>", "concepts": ["cat"]})
    assert tagged.prompt == "a xlo bear"
    assert [(one.name, one.weight) for one in chosen_concepts(tagged)] == [("cat", None), ("bear", 0.5), ("robot", 1.0)]
    assert asked({**SIZE, "prompt": "a <lora:bear:1>", "method": "tara"}).method == "tara"


@pytest.mark.parametrize("kind", ["entries", "fields", "fields of a concept", "values", "one name"])
def test_messages_are_short_and_repeat_nothing(kind: str) -> None:
    secret = "swordfish" * 1000
    given: dict[str, Any] = {
        "entries": {"prompt": "a", "concepts": [secret] * 30_000},
        "fields": {"prompt": "a", **{f"{secret}{i}": 1 for i in range(10_000)}},
        "fields of a concept": {"prompt": "a", "concepts": [{f"{secret}{i}": 1 for i in range(10_000)}]},
        "values": dict.fromkeys(ImageRequest.model_fields, secret),
        "one name": {"prompt": f"a <lora:{secret[:500]}:1>", "concepts": [{"name": "cat", secret: 1}] * 8},
    }[kind]
    with pytest.raises(ValidationError) as raised:
        ImageRequest.model_validate(given)
    errors = [{**error, "loc": ("body", *error["loc"])} for error in raised.value.errors()]
    assert len(errors) < 40
    assert len(text := reasons(errors)) < 1700
    assert "swordfish" not in text


def test_messages_name_the_place_and_what_was_expected() -> None:
    wrong = {"prmpt": "a", "steps": "x", "concepts": [{"name": "cat", "wieght": 1}, {"name": "cat", "weight": 11}]}
    with pytest.raises(ValidationError) as raised:
        ImageRequest.model_validate(wrong)
    text = reasons([{**error, "loc": ("body", *error["loc"])} for error in raised.value.errors()])
    assert "prompt: Field required" in text
    assert f"fields are {', '.join(ImageRequest.model_fields)}; did you mean 'prompt'?" in text
    assert f"concepts[0]: there is an unknown field; fields are {', '.join(RequestedConcept.model_fields)}" in text
    assert "did you mean 'weight'?" in text
    assert "concepts[1].weight: Input should be less than or equal to 10" in text
    assert "steps: Input should be a valid integer" in text


@pytest.mark.parametrize(
    ("wrong", "where"),
    [({"list": 1}, "there is an unknown field"), ({"concepts": [{"name": "cat", "list": 1}]}, "concepts[0]: there is")],
)
def test_an_unknown_field_may_have_any_name(wrong: dict[str, Any], where: str) -> None:
    """Also that by which errors tell a list of concepts from "auto"."""
    with pytest.raises(ValidationError) as raised:
        ImageRequest.model_validate({"prompt": "a", **wrong})
    assert reasons([{**error, "loc": ("body", *error["loc"])} for error in raised.value.errors()]).startswith(where)
