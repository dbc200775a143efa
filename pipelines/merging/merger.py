"""What a merger is: settings that, given all layers, become a function of one layer."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

from torch import Tensor

from lora_compose.attention.lora_bank import LoraFactors

Changes = Sequence[LoraFactors]
"""One layer's change by every LoRA, weights in the scales; rank 0 where a LoRA does not change it."""

MergeLayer = Callable[[Changes, Tensor | None], LoraFactors]
"""The changes of a layer and, for mergers that need a model, the moments of its inputs -> one change.

Moments: with A = [A_1; A_2; ...] and x the inputs of the layer while LoRA k alone acts, the mean of (A x)(A x)^T.
Shape: [LoRAs, sum of ranks, sum of ranks].
"""


class Merger(ABC):
    """Settings of a merger; subclasses are frozen dataclasses.

    Attributes:
        pair: Whether it takes exactly two LoRAs, a subject and then a style.
        resolves: Whether it resolves conflicts between LoRAs; one alone has none, and stays as it is.
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
    """Checks a setting that is a share.

    Raises:
        ValueError: If it is no number above a limit and up to 1.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not above < value <= 1:
        raise ValueError(f"{name} is a share, above {above:g} and up to 1, not {value!r}")


def check_positive(name: str, value: object, kind: type = float) -> None:
    """Checks a setting that is a positive number.

    Args:
        name: Of the setting.
        value: What was given.
        kind: int for whole numbers.

    Raises:
        ValueError: If it is not one.
    """
    numbers = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, numbers) or not 0 < value < float("inf"):
        raise ValueError(f"{name} is a positive {'whole ' if kind is int else ''}number, not {value!r}")
