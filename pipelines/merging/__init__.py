"""Merges several LoRAs into one, layer by layer: one paper, one file. `MERGERS` is the registry.

`merger.py` defines a merger; `factors.py` has the algebra that all share.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lora_compose.pipelines.merging.concatenation import Cat, Svd
from lora_compose.pipelines.merging.dare import Dare
from lora_compose.pipelines.merging.iteris import IterIs
from lora_compose.pipelines.merging.k_lora import KLora
from lora_compose.pipelines.merging.lego import Lego
from lora_compose.pipelines.merging.merger import Changes, MergeLayer, Merger, Moments
from lora_compose.pipelines.merging.np_lora import NpLora
from lora_compose.pipelines.merging.soups import Soups
from lora_compose.pipelines.merging.ssr import Ssr
from lora_compose.pipelines.merging.ties import Ties
from lora_compose.pipelines.merging.tsv import Tsv

__all__ = ["MERGERS", "Changes", "MergeLayer", "Merger", "Moments", "make_merger", "settings_of"]

MERGERS: Mapping[str, type[Merger]] = {
    "cat": Cat,
    "svd": Svd,
    "ties": Ties,
    "dare": Dare,
    "tsv": Tsv,
    "lego": Lego,
    "np": NpLora,
    "k-lora": KLora,
    "soups": Soups,
    "ssr": Ssr,
    "iteris": IterIs,
}


def make_merger(name: str, settings: Mapping[str, Any] | None = None) -> Merger:
    """A merger by its name.

    Args:
        settings: Fields that differ from the defaults.

    Raises:
        ValueError: For unknown names, unknown settings and unusable values; the message lists those that exist.
    """
    merger = MERGERS.get(name)
    if merger is None:
        raise ValueError(f"unknown method {name!r}; there are {', '.join(MERGERS)}")
    known = settings_of(merger())
    if unknown := (settings or {}).keys() - known.keys():
        raise ValueError(f"{name} has no settings {sorted(unknown)}; it has {', '.join(known) or 'none'}")
    return merger(**{**known, **(settings or {})})


def settings_of(merger: Merger) -> dict[str, Any]:
    """All settings of a merger, for the metadata of its file."""
    return asdict(merger)  # pyright: ignore[reportArgumentType]  # all subclasses are dataclasses
