"""The strength of a concept: weight schedules over the steps, and factors on blocks of the model."""

import math
import re
import reprlib
from bisect import bisect_right
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from lora_compose.pipelines.support.numbers import as_plain

if TYPE_CHECKING:  # scenes are read without torch
    from lora_compose.attention.lora_bank import Lora

Weight = float | Sequence[float] | str
"""A number; a list of numbers, for equal parts of the steps; or a schedule in text, "0:1..0.5:0.4"."""

TEXT = "text"
"""Name of the text encoders among the blocks."""

SANE_WEIGHT = 10.0
"""Weights beyond it in either direction have to be asked for (`Concept.any_weight`): images are noise there."""

_MOST = 1000  # numbers in a schedule
_NUMBER = r"[+-]?(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?"
_POINT = re.compile(rf"(?:({_NUMBER}):)?({_NUMBER})")
_BLOCK = re.compile(r"text|mid(_block)?(\.\w+)*|(down|up)(_blocks)?(\.\w+)*")
_LONG = {"down": "down_blocks", "mid": "mid_block", "up": "up_blocks"}
_HINT = "a valid number, a list of numbers, or a schedule such as 1..0.4 (a ramp) or 0:1,0.5:0 (off in the second half)"


@dataclass(frozen=True)
class Point:
    """A keyframe of a weight schedule.

    Attributes:
        at: A fraction of the steps, or a step number.
        weight: The weight there.
        ramp: Whether the weight changes evenly to that of the next point; otherwise it stays until there.
    """

    at: float
    weight: float
    ramp: bool = False


@dataclass(frozen=True)
class WeightSchedule:
    """The weight of every step, from keyframes in order.

    Points are at fractions of the steps or, if any is above 1, all at step numbers, counted from 0. A fraction takes
    effect in the last step at the latest, so that a ramp to 1 reaches its end. Before its first and after its last
    point a schedule is constant.

    Attributes:
        points: At least one.
    """

    points: tuple[Point, ...]

    @classmethod
    def of(cls, weight: Weight) -> "WeightSchedule":
        """The schedule that a checked weight means (`read_weight`)."""
        if isinstance(weight, str):
            return _parse(weight)
        listed = (weight,) if isinstance(weight, float | int) else weight
        return cls(tuple(Point(i / len(listed), value) for i, value in enumerate(listed)))

    @property
    def constant(self) -> float | None:
        """The weight, if it is the same in all steps."""
        first, *others = {point.weight for point in self.points}
        return None if others else first

    def at(self, step: int, steps: int) -> float:
        """The weight of a step out of so many."""
        starts = [self._start(point, steps) for point in self.points]
        i = bisect_right(starts, step) - 1
        point = self.points[max(i, 0)]
        if not point.ramp or i < 0:
            return point.weight
        done = (step - starts[i]) / (starts[i + 1] - starts[i])
        return point.weight + done * (self.points[i + 1].weight - point.weight)

    def mean(self, steps: int) -> float:
        """The mean over all steps."""
        return sum(self.at(step, steps) for step in range(steps)) / steps

    def _start(self, point: Point, steps: int) -> float:
        if self.points[-1].at > 1:
            return point.at
        # Rounded, since 0.28 * 25 is more than 7 in floating point. A single step is the first.
        return min(round(point.at * steps, 6), max(steps - 1, 1))


def read_weight(value: Any) -> Weight:
    """Checks a weight given in Python, YAML, JSON or on the command line.

    Text may be a number ("0.8"), numbers for equal parts of the steps ("1,0.5,0"), points at which weights begin
    ("0:1,0.5:0"), or ramps between points ("0:1..0.5:0.4", or "1..0.4" from the first step to the last). Raises
    ValueError for anything else, with what is expected.
    """
    value = as_plain(value)
    if isinstance(value, str):
        return _read_text(value)
    if isinstance(value, list | tuple):
        if not 0 < len(value) <= _MOST:
            raise ValueError(f"expected 1 to {_MOST} numbers, one for each equal part of the steps, found {len(value)}")
        return tuple(map(_finite, value))
    return _finite(value)


def _finite(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        shown = value if isinstance(value, str) else reprlib.repr(value)  # which follows lists in lists a few levels
        raise ValueError(f"expected {_HINT}; found {shown[:80]!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"expected a finite number, found {number}")
    return number


def _read_text(text: str) -> Weight:
    text = re.sub(r"\s+", "", text)
    try:
        number = float(text)
    except ValueError:
        pass  # several numbers, or none
    else:
        return _finite(number)
    schedule = _parse(text)
    if ":" in text or ".." in text:
        return text
    return tuple(point.weight for point in schedule.points)


def _parse(text: str) -> WeightSchedule:
    pieces = re.split(r"(\.\.|,)", text)
    texts, ramps = pieces[::2], [piece == ".." for piece in pieces[1::2]]
    matches = [_POINT.fullmatch(piece) for piece in texts]
    if len(texts) > _MOST or not all(matches):
        raise ValueError(f"expected {_HINT}; found {text[:80]!r}")
    pairs = [point.groups() for point in matches if point]
    weights = [_finite(float(weight)) for _, weight in pairs]
    if all(at is None for at, _ in pairs):
        if any(ramps) and not all(ramps):
            raise ValueError(f"a schedule with both .. and , needs positions: 0:1..0.5:0.4,0.8:0; found {text[:80]!r}")
        ends = max(len(pairs) - 1, 1) if any(ramps) else len(pairs)
        places = [i / ends for i in range(len(pairs))]
    else:
        places = _positions([at for at, _ in pairs], text)
    return WeightSchedule(tuple(map(Point, places, weights, [*ramps, False])))


def _positions(positions: Iterable[str | None], text: str) -> list[float]:
    """The positions of the points, in order."""
    places = [math.nan if at is None else float(at) for at in positions]
    if any(math.isnan(place) for place in places):
        raise ValueError(f"give every point of a schedule a position, as in 0:1,0.5:0, or none; found {text[:80]!r}")
    if places[0] < 0 or any(a >= b for a, b in pairwise(places)):
        raise ValueError(f"the points of a schedule begin at 0 or later, one after the other; found {text[:80]!r}")
    if places[-1] > 1 and any(place % 1 for place in places):  # also where one is infinite
        raise ValueError(
            "points of a schedule are at fractions of the steps from 0 to 1, or all at whole step numbers; "
            f"found {text[:80]!r}"
        )
    return places


def largest_factor(weight: Weight | None, blocks: Mapping[str, float] | None = None) -> float:
    """The largest factor, without its sign, that a weight and factors on blocks put on a LoRA."""
    points = WeightSchedule.of(1.0 if weight is None else weight).points
    return max(abs(point.weight) for point in points) * max([1.0, *map(abs, (blocks or {}).values())])


def check_sane(weight: Weight | None, blocks: Mapping[str, float] | None, files: Iterable[float] = ()) -> None:
    """Raises ValueError for weights beyond `SANE_WEIGHT`, also of files: a box, or a slip of the decimal point."""
    largest = max([largest_factor(weight, blocks), *map(abs, files)])
    if largest <= SANE_WEIGHT:
        return
    hint = ""
    if isinstance(weight, list | tuple):
        box = "a box is a region, not a weight" if is_box(weight) else "a box is four numbers: left, top, right, bottom"
        hint = f"; {box}"
    raise ValueError(
        f"the weight reaches {largest:g}; beyond {SANE_WEIGHT:g} and -{SANE_WEIGHT:g} images are noise{hint}; "
        "any_weight=True allows it"
    )


def is_box(value: Any) -> bool:
    """Whether a value may be a box: left, top, right, bottom."""
    if not isinstance(value, list | tuple) or len(value) != 4:
        return False
    if any(isinstance(side, bool) or not isinstance(side, int | float) for side in value):
        return False
    left, top, right, bottom = value
    return 0 <= left < right and 0 <= top < bottom


def weight_text(weight: Weight | None) -> str:
    """A weight as it is written on the command line and on the page."""
    if isinstance(weight, str):
        return weight
    return (
        ",".join(map(_number, weight)) if isinstance(weight, Sequence) else _number(1.0 if weight is None else weight)
    )


def _number(value: float) -> str:
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))


def read_blocks(blocks: Any) -> dict[str, float] | None:
    """Checks factors on blocks: a mapping, or text such as "down:0.5,up.1:0".

    Raises:
        ValueError: For names that are no blocks, names given twice and values that are not numbers.
    """
    pairs = _pairs(blocks) if isinstance(blocks, str) else blocks
    if pairs is None:
        return None
    if not isinstance(pairs, Mapping):
        raise ValueError(f"expected factors by block, such as {{down: 0.5, up.1: 0}}, found {str(blocks)[:80]!r}")
    seen: dict[str, str] = {}
    for name in pairs:
        if not isinstance(name, str) or not _BLOCK.fullmatch(name):
            raise ValueError(
                f"there is no block {str(name)[:80]!r}; expected down, mid, up, down.0, up.1, ..., a full name in "
                "diffusers such as up_blocks.1.attentions.0, or text for the text encoders"
            )
        if (long := long_name(name)) in seen:
            raise ValueError(f"{seen[long]} and {name} are the same block; give it once")
        seen[long] = name
    return {name: _finite(value) for name, value in pairs.items()}


def _pairs(text: str) -> dict[str, float]:
    pairs = [part.strip().rpartition(":") for part in text.split(",") if part.strip()]
    names = [name.strip() for name, _, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"a block is given twice in {text[:80]!r}")
    for _, colon, value in pairs:
        if not colon or not re.fullmatch(_NUMBER, value.strip()):
            raise ValueError(f"expected factors by block, such as down:0.5,up.1:0, found {text[:80]!r}")
    return {name: float(value) for name, (_, _, value) in zip(names, pairs, strict=True)}


def blocks_text(blocks: Mapping[str, float] | None) -> str:
    """Factors on blocks as they are written on the command line and on the page."""
    return ",".join(f"{name}:{_number(value)}" for name, value in (blocks or {}).items())


def long_name(block: str) -> str:
    """A block's name in diffusers: "up.1" is "up_blocks.1"."""
    first, dot, rest = block.partition(".")
    return f"{_LONG.get(first, first)}{dot}{rest}"


def in_blocks(lora: "Lora", blocks: Mapping[str, float] | None) -> "Lora":
    """A LoRA with the factor of its block (the longest matching name) on every layer; 0 leaves the layer out."""
    if not blocks:
        return lora
    long = {long_name(block): factor for block, factor in blocks.items()}
    factors = {name: long[block] if (block := _block_of(name, long)) else 1.0 for name in lora}
    return {name: replace(lora[name], scale=lora[name].scale * by) for name, by in factors.items() if by != 0}


def _block_of(layer: str, blocks: Iterable[str]) -> str | None:
    return max((block for block in blocks if is_in(layer, block)), key=len, default=None)


def is_in(layer: str, block: str) -> bool:
    """Whether a layer is inside a block, or is the block."""
    return f"{layer}.".startswith(f"{long_name(block)}.")


def check_block(concept: str, block: str, layers: Collection[str]) -> None:
    """Raises ValueError if a model with these layers does not have a block; the message names those it has."""
    if any(is_in(layer, block) for layer in layers):
        return
    there = {match[0] for layer in layers if (match := re.match(r"(down_blocks|up_blocks)\.\d+|mid_block", layer))}
    raise ValueError(f"concept {concept!r} has a factor for {block!r}, but this model has {', '.join(sorted(there))}")
