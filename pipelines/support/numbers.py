"""Numbers of NumPy and torch as Python's own."""

from typing import Any


def as_plain(value: Any) -> Any:
    """Scalars of NumPy or torch, lists and tuples of them, and arrays with one axis in plain numbers; else as it is."""
    if isinstance(value, list | tuple):
        return tuple(_plain(item, 0) for item in value)
    return _plain(value, 1)


def _plain(value: Any, axes: int) -> Any:
    """An array of at most so many axes in plain numbers; everything else as it is."""
    return value.tolist() if hasattr(value, "tolist") and getattr(value, "ndim", axes + 1) <= axes else value
