"""The kinds of LoRA that a file can have, each in a file of its own (`kind.py` says what it has), and their list."""

from collections.abc import Collection, Mapping
from functools import cache

from lora_compose.pipelines.formats.kinds.difference import DIFFERENCE
from lora_compose.pipelines.formats.kinds.dora import DORA
from lora_compose.pipelines.formats.kinds.kind import Kind, Shapes, check_own, first_of, rows
from lora_compose.pipelines.formats.kinds.loha import LOHA
from lora_compose.pipelines.formats.kinds.lokr import LOKR
from lora_compose.pipelines.formats.kinds.low_rank import LOW_RANK, TUCKER
from lora_compose.pipelines.formats.kinds.oft import OFT, OFT_INPUTS
from lora_compose.pipelines.formats.kinds.refused import LEFT_OUT, REFUSED
from lora_compose.pipelines.formats.kinds.tlora import TLORA

KINDS: tuple[Kind, ...] = (*REFUSED, DORA, OFT, OFT_INPUTS, TLORA, LOKR, LOHA, TUCKER, LOW_RANK, DIFFERENCE, LEFT_OUT)
"""A layer is of the first kind that has an ending for one of its tensors."""


def numbers() -> Mapping[str, str]:
    """By slot, the ends of keys with a single number beside the tensors of a layer."""
    return _numbers(KINDS)


@cache
def _numbers(known: tuple[Kind, ...]) -> Mapping[str, str]:
    of_kinds = {slot: end for kind in known for slot, end in (kind.numbers | kind.flags).items()}
    return {"alpha": r"\.alpha", "scalar": r"\.scalar", **of_kinds}


def flags() -> Collection[str]:
    """The slots of those that are true or false."""
    return _flags(KINDS)


@cache
def _flags(known: tuple[Kind, ...]) -> Collection[str]:
    return frozenset(slot for kind in known for slot in kind.flags)


def kind_of(slots: Collection[str]) -> Kind:
    """The kind of a layer, by its tensors but alpha. Raises ValueError if there are none, or some of another kind."""
    kind = first_of(KINDS, slots)
    if kind is None:
        raise ValueError("it has no tensors but an alpha; the file is incomplete")
    if not kind.refused:
        check_own(kind, slots)
    return kind


def readable(shapes: Shapes) -> Kind | None:
    """The first kind that a layer has tensors of and that is read."""
    return first_of((kind for kind in KINDS if not kind.refused and not kind.left_out), shapes)


def rank_of(shapes: Shapes) -> int | None:
    """The rank that divides a layer's alpha; None if alpha has no effect, or no tensor tells. Raises as `rows`."""
    kind = readable(shapes)
    return next((rows(shapes, slot) for slot in (kind.ranked if kind else ()) if slot in shapes), None)
