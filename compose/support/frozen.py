"""The base of our own models, and fields that several of them describe in the same words."""

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """A model that does not change, has no unknown fields, and finite numbers only."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def shared(names: Iterable[str], *sources: object, **others: Any) -> dict[str, Any]:
    """The fields of these names that objects have, of several with one name the last one's; and others instead."""
    names = tuple(names)
    return {name: getattr(one, name) for one in sources for name in names if hasattr(one, name)} | others
