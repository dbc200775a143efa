"""Names of methods that the command line needs without importing torch, and suggestions for mistyped ones."""

from collections.abc import Collection
from pathlib import Path

from lora_compose.pipelines.support.spelling import did_you_mean

__all__ = [
    "DTYPES",
    "MERGERS",
    "METHODS",
    "METHODS_FILE",
    "PRESETS",
    "STRUCTURES",
    "TRAINING_PRESETS",
    "TRAINING_SCOPES",
    "check_merger",
    "check_method",
    "did_you_mean",
    "file_near",
    "unknown",
]

METHODS = ("merge", "tara", "regional", "switch", "composite", "lora-composer", "clora", "draft", "freefuse")
PRESETS = (
    "tara:official", "lora-composer:official", "lora-composer:paper", "clora:official", "freefuse:official",
    "freefuse:official-flux",
)  # fmt: skip
MERGERS = ("cat", "svd", "ties", "dare", "tsv", "lego", "np", "k-lora", "soups", "ssr", "iteris")
"""The registries themselves import torch; a test compares them with these."""

METHODS_FILE = Path(__file__).with_name("methods.json")
"""Methods with their settings in words, as `compose/generate/method_list.py` writes them."""

DTYPES = ("float32", "float16", "bfloat16")
STRUCTURES = ("random:sd-1.5",)
"""Models with random weights, which only the benchmark can open."""

TRAINING_PRESETS = ("sd", "sdxl", "transformer", "playground", "playground-flux")
TRAINING_SCOPES = ("cross_kv", "attention", "transformer", "convolutions")


def file_near(path: Path) -> str:
    """The end of a message about a missing path: a file with a similar name, or nothing."""
    try:
        beside = {entry.name for entry in path.parent.iterdir()}
    except OSError:  # there is no such folder, or it is not ours to read
        return ""
    near = did_you_mean(path.name, sorted(beside))
    return near if path.parent == Path() else near.replace("did you mean ", f"in {path.parent}, did you mean ")


def check_method(method: str | None) -> None:
    """Raises ValueError for an unknown method; None means that one is chosen."""
    if method is not None and method not in (*METHODS, *PRESETS):
        raise ValueError(unknown("method", method, (*METHODS, *PRESETS)))


def check_merger(merger: str | None) -> None:
    """Raises ValueError for an unknown method of merging files; None means their exact sum."""
    if merger is not None and merger not in MERGERS:
        raise ValueError(unknown("method of merging", merger, MERGERS))


def unknown(kind: str, name: str, known: Collection[str]) -> str:
    """A message about an unknown name, with the known ones."""
    return f"unknown {kind} {name!r}; there are {', '.join(known)}{did_you_mean(name, known)}"
