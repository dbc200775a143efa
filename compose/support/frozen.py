"""The base of our own models, and fields that several of them describe in the same words."""

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """A model that does not change, has no unknown fields, and finite numbers only."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def shared(names: Iterable[str], *sources: object, **others: Any) -> dict[str, Any]:
    """Fields by name, taken from objects that have them; the last object wins, and `others` win over all.

    Raises:
        TypeError: If neither an object nor `others` has a name, as after a field was renamed.
    """
    names = tuple(names)
    found = {name: getattr(one, name) for one in sources for name in names if hasattr(one, name)} | others
    if missing := [name for name in names if name not in found]:
        kinds = ", ".join(type(one).__name__ for one in sources)
        raise TypeError(f"{kinds}: no field {', '.join(missing)}; leave these names out if their defaults are meant")
    return found
