"""Numbers of NumPy and torch as Python's own."""

from typing import Any


def as_plain(value: Any) -> Any:
    """Scalars of NumPy or torch, lists and tuples with them, and arrays with one axis in plain numbers; else as is."""
    if isinstance(value, list | tuple):
        return tuple(map(as_plain, value))
    return value.tolist() if hasattr(value, "tolist") and getattr(value, "ndim", 2) < 2 else value
