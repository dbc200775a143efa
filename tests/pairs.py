"""Parameters in pairs: by default every value of two lists at least once, and their whole product with `-m slow`."""

from collections.abc import Container, Iterable
from typing import Any

import pytest


def in_pairs(first: Iterable[Any], second: Iterable[Any]) -> list[Any]:
    """Parameters of each value of the one list with each of the other; tuples among them are several parameters.

    By default a value of the longer list has one of the shorter list, whose values take turns.
    """
    one, other = list(first), list(second)
    pairs = []
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            usual = i % len(other) == j if len(one) >= len(other) else j % len(one) == i
            left, right = _parameters(a), _parameters(b)
            slow = [] if usual else [pytest.mark.slow]
            pairs.append(pytest.param(*left.values, *right.values, marks=[*left.marks, *right.marks, *slow]))
    return pairs


def _parameters(value: Any) -> Any:
    if isinstance(value, type(pytest.param())):
        return value
    return pytest.param(*value) if isinstance(value, tuple) else pytest.param(value)


def slow_but(usual: Container[Any], values: Iterable[Any]) -> list[Any]:
    """Parameters of each value, slow unless it is among the usual ones."""
    return [pytest.param(value, marks=() if value in usual else pytest.mark.slow) for value in values]
