"""How costs grow with a number."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log


@dataclass(frozen=True)
class Point:
    """Costs at one number: quantities by name."""

    at: int
    costs: Mapping[str, float]


@dataclass(frozen=True)
class Curve:
    """How costs grow with something."""

    against: str
    points: Sequence[Point]

    def exponents(self) -> dict[str, float]:
        """The exponent p of the growth `a + b n^p` of each quantity; 0 where nothing grows.

        From the last three points, if each is at as many times the number before it.
        """
        first, second, third = self.points[-3:]
        return {
            name: _growth(second.costs[name] - first.costs[name], third.costs[name] - second.costs[name])
            / log(third.at / second.at)
            for name in first.costs
        }


def _growth(first: float, second: float) -> float:
    return log(second / first) if first > 0 and second > 0 else 0.0
