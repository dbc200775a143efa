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
    fields = {name: getattr(source, name) for source in sources for name in names if hasattr(source, name)} | others
    if missing := [name for name in names if name not in fields]:
        kinds = ", ".join(type(source).__name__ for source in sources)
        raise TypeError(f"{kinds}: no field {', '.join(missing)}; leave these names out if their defaults are meant")
    return fields
