"""The interface of a merger: settings that make, from all layers, a function of one layer."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

from torch import Tensor

from lora_compose.attention.lora_bank import LoraFactors

Changes = Sequence[LoraFactors]
"""The change of one layer by each LoRA, including its weight; rank 0 where a LoRA does not change it."""

MergeLayer = Callable[[Changes, Tensor | None], LoraFactors]
"""From the changes of a layer, and for mergers that need a model the moments of its inputs, to one change.

Moments: with A = [A_1; A_2; ...] and x the inputs of the layer while LoRA k alone acts, the mean of (A x)(A x)^T.
Shape: [LoRAs, sum of ranks, sum of ranks].
"""


class Merger(ABC):
    """Settings of a merger; subclasses are frozen dataclasses.

    Attributes:
        pair: Whether it takes exactly two LoRAs, a subject and then a style.
        resolves: Whether it resolves conflicts between LoRAs; a layer that only one LoRA changes is then left as it is.
        needs_model: Whether it needs the moments of the inputs, which only a model can give.
    """

    pair: ClassVar[bool] = False
    resolves: ClassVar[bool] = True
    needs_model: ClassVar[bool] = False

    @abstractmethod
    def start(self, layers: Iterable[Changes]) -> MergeLayer:
        """The function that merges each of the layers, in their order.

        Args:
            layers: All of them, for mergers that compare layers; others do not look at them.
        """


def check_share(name: str, value: object, *, above: float = 0.0) -> None:
    """Checks a setting that is a fraction.

    Raises:
        ValueError: If it is not a number above the limit and at most 1.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not above < value <= 1:
        raise ValueError(f"{name} must be above {above:g} and at most 1, not {value!r}")


def check_positive(name: str, value: object, kind: type = float) -> None:
    """Checks a setting that is a positive number.

    Args:
        kind: `int` for whole numbers.

    Raises:
        ValueError: If it is not one.
    """
    numbers = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, numbers) or not 0 < value < float("inf"):
        raise ValueError(f"{name} must be a positive {'whole ' if kind is int else ''}number, not {value!r}")
