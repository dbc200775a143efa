"""Names that the command line knows without torch, and what somebody may have meant who mistyped one."""

from collections.abc import Collection
from difflib import get_close_matches
from pathlib import Path

METHODS = ("merge", "tara", "regional", "switch", "composite", "lora-composer", "clora", "draft")
PRESETS = ("tara:official", "lora-composer:official", "lora-composer:paper", "clora:official")
MERGERS = ("cat", "svd", "ties", "dare", "tsv", "lego", "np", "k-lora", "soups", "ssr")
"""The registries themselves import torch; a test compares them with these."""

TRAINING_PRESETS = ("sd", "sdxl", "playground")
_MOST = 10_000  # names that are compared


def did_you_mean(name: str, known: Collection[str]) -> str:
    """The end of a complaint about a name: "; did you mean 'clora'?", or nothing if none is spelled alike."""
    # Letters of either case, since get_close_matches takes "CLoRA" and "clora" for different words.
    by_lower = {one.lower(): one for one in list(known)[:_MOST]}
    near = [by_lower[found] for found in get_close_matches(name.lower(), by_lower, n=2, cutoff=0.6)]
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def file_near(path: Path) -> str:
    """The end of a complaint about a path that leads nowhere: what is beside it and spelled alike, or nothing."""
    try:
        beside = {found.name for found in path.parent.iterdir()}
    except OSError:  # there is no such folder, or it is not ours to read
        return ""
    near = did_you_mean(path.name, sorted(beside))
    return near if path.parent == Path() else near.replace("did you mean ", f"in {path.parent}, did you mean ")


def check_method(method: str | None) -> None:
    """Raises ValueError for a method that there is not; None is a choice of the program's."""
    if method is not None and method not in (*METHODS, *PRESETS):
        raise ValueError(unknown("method", method, (*METHODS, *PRESETS)))


def unknown(kind: str, name: str, known: Collection[str]) -> str:
    """A complaint about a name that is not known, with those that are."""
    return f"unknown {kind} {name!r}; there are {', '.join(known)}{did_you_mean(name, known)}"
