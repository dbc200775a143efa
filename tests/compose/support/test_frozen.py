"""Fields that several models describe in the same words."""

from types import SimpleNamespace

import pytest

from lora_compose.compose.support.frozen import shared


def test_the_last_object_with_a_field_wins_and_what_is_given_wins_over_all() -> None:
    first, last = SimpleNamespace(a=1, b=1, c=1, other=1), SimpleNamespace(b=2, c=2)
    assert shared(("a", "b", "c"), first, last, c=3) == {"a": 1, "b": 2, "c": 3}


def test_a_name_that_nothing_has_is_an_error() -> None:
    with pytest.raises(TypeError, match="SimpleNamespace: no field renamed; leave these names out if their defaults"):
        shared(("a", "renamed"), SimpleNamespace(a=1))
