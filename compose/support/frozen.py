"""The base of our own models, and fields that several of them describe in the same words."""

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel


class Frozen(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """A model that does not change, has no unknown fields, and finite numbers only."""


def shared(names: Iterable[str], *sources: object) -> dict[str, Any]:
    """The fields of these names that objects have, by name; of several objects with one, the last one's."""
    names = tuple(names)
    return {name: getattr(one, name) for one in sources for name in names if hasattr(one, name)}
