"""T-LoRA: fewer ranks act where there is more noise (arXiv 2507.05964).

With R ranks, at a timestep t of T, r(t) = int(((T - t) / T)^a (R - least)) + least of them act, the first ones, in the
denoiser alone. Trainers write least, a and T into the header (sd-scripts' network for Anima), or least alone, where a
is 1 and t a whole number of 1000 (fizgig). Other trainers round in other ways, or do not write how.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from lora_compose.pipelines.formats.files import LoraFile
from lora_compose.pipelines.formats.keys import parse
from lora_compose.pipelines.formats.kinds import LOW_RANK, TLORA, rank_of
from lora_compose.pipelines.formats.layers import Layer

_LEAST, _EXPONENT, _LAST = "ss_tlora_min_rank", "ss_tlora_alpha_rank_scale", "ss_tlora_max_timestep"
_ROUNDED = "ss_tlora_rank_schedule"
"""Header key of trainers whose rounding of ranks differs from version to version."""
_TIMESTEPS = 1000  # of the authors
_MOST = 2**16

ALL_RANKS = (
    "a T-LoRA, trained with fewer ranks where there is more noise; here all of them act in every step, which may give "
    "burnt or oversaturated images"
)
"""What to say of a T-LoRA where its ranks do not follow the noise."""


@dataclass(frozen=True)
class RankSchedule:
    """How many ranks act at which timestep.

    Attributes:
        least: At the last timestep.
        most: At timestep 0.
        exponent: Above 1, fewer ranks act in between.
        last: The last timestep, of so many; up to 1, as a share of those that the model was trained with.
        whole: Whether timesteps are rounded down to whole numbers.
        factors: Rank of the change for each rank of the file.
    """

    least: int
    most: int
    exponent: float = 1.0
    last: float = 1.0
    whole: bool = False
    factors: int = 1

    def at(self, timestep: float, trained: int) -> int:
        """The number of first ranks of the change that act at a timestep of so many trained ones."""
        t = timestep * _TIMESTEPS / trained if self.last > 1 else timestep / trained
        t = math.floor(t) if self.whole else t
        share = max(0.0, (self.last - t) / self.last)
        acting = int(share**self.exponent * (self.most - self.least)) + self.least
        return self.factors * max(self.least, min(acting, self.most))


def is_tlora(metadata: Mapping[str, str], keys: Iterable[str] = ()) -> bool:
    """Whether a file was trained with fewer ranks where there is more noise, by its header and its keys."""
    named = " ".join(metadata.get(key, "") for key in ("ss_adapter", "ss_network_module")).lower()
    declared = "tlora" in named or any(key.startswith("ss_tlora_") for key in metadata)
    return declared or any(
        key.kind is TLORA or key.slot in TLORA.numbers for key in map(parse, keys) if key is not None
    )


def rank_schedule(
    file: LoraFile, layers: Collection[Layer], conditioned: bool
) -> tuple[RankSchedule | None, tuple[str, ...]]:
    """The schedule of a T-LoRA, and notes on what of it is not followed; nothing for other files.

    `layers` are those of the denoiser; `conditioned` is whether it also changes a text conditioner, which runs once.
    """
    if not layers or not is_tlora(file.metadata, file.tensors):
        return None, ()
    (kind, *others), ranks = {layer.kind for layer in layers}, [rank_of(layer.shapes) or 0 for layer in layers]
    declared = _declared(file.metadata, max(ranks))
    if declared is None or others or kind not in (LOW_RANK, TLORA):
        return None, (f"it is {ALL_RANKS}",)
    notes = ("its text conditioner runs once, so there all ranks of this T-LoRA act",) if conditioned else ()
    return (replace(declared, factors=2) if kind is TLORA else declared), notes


def _declared(metadata: Mapping[str, str], most: int) -> RankSchedule | None:
    """The schedule in a header, of which `most` ranks are the default; None if it has none, or an unknown one."""
    least, most = _number(metadata.get(_LEAST)), int(_number(metadata.get("ss_network_dim")) or most)
    if least is None or _ROUNDED in metadata or not (least.is_integer() and least <= most <= _MOST):
        return None
    if metadata.get("ss_adapter") == "tlora":
        return RankSchedule(int(least), most, 1.0, _TIMESTEPS, whole=True)
    exponent, last = _number(metadata.get(_EXPONENT)), _number(metadata.get(_LAST))
    if not exponent or not last:
        return None
    return RankSchedule(int(least), most, exponent, last)


def _number(text: str | None) -> float | None:
    """A number of a header that is at least 0; None for anything else."""
    return float(text) if text and re.fullmatch(r"\d{1,6}(?:\.\d{0,9})?", text) else None
