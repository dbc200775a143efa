"""The interface of a merger: settings that make, from all layers, a function of one layer."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lora_compose.attention.lora_bank import LoraFactors

Changes = Sequence[LoraFactors]
"""The change of one layer by each LoRA, including its weight; rank 0 where a LoRA does not change it."""


@dataclass(frozen=True, eq=False)
class Moments:
    """What a layer reads in the calibration images of each LoRA, by the rows of A = [A_1; A_2; ...].

    x are the inputs of the layer while LoRA k alone acts, y those that it has if the merged LoRA of the round before
    acts in LoRA k's place, on the same inputs of the whole model; in the first round y is x. Shapes: [LoRAs, sum of
    ranks, sum of ranks].

    Attributes:
        alone: The mean of (A x)(A x)^T.
        merged: The mean of (A y)(A y)^T.
        cross: The mean of (A x)(A y)^T.
    """

    alone: Tensor
    merged: Tensor
    cross: Tensor

    @classmethod
    def zeros(cls, loras: int, ranks: int) -> "Moments":
        """Sums to add to, in fp64."""
        return cls(*(torch.zeros(loras, ranks, ranks, dtype=torch.float64) for _ in range(3)))

    @classmethod
    def first(cls, alone: Tensor) -> "Moments":
        """Moments of the first round, in which there is no merged model yet: all are of each LoRA alone."""
        return cls(alone, alone, alone)


MergeLayer = Callable[[Changes, Moments | None], LoraFactors]
"""From the changes of a layer, and for mergers that need a model the moments of its inputs, to one change."""


class Merger(ABC):
    """Settings of a merger; subclasses are frozen dataclasses.

    Attributes:
        pair: Whether it takes exactly two LoRAs, a subject and then a style.
        resolves: Whether it resolves conflicts between LoRAs; a layer that only one LoRA changes is then left as it is.
        needs_model: Whether it needs the moments of the inputs, which only a model can give.
        rounds: How often these are measured: in every round but the first, beside the merged LoRA of the round before.
    """

    pair: ClassVar[bool] = False
    resolves: ClassVar[bool] = True
    needs_model: ClassVar[bool] = False
    rounds: int = 1

    @abstractmethod
    def start(self, layers: Iterable[Changes]) -> MergeLayer:
        """The function that merges each of the layers, in their order.

        Args:
            layers: All of them, for mergers that compare layers; others do not look at them.
        """


def check_share(name: str, value: object) -> None:
    """Raises ValueError for a setting that is no number above 0 and at most 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, not {value!r}")


def check_positive(name: str, value: object, kind: type = float) -> None:
    """Raises ValueError for a setting that is no positive number; `kind` is `int` for whole numbers."""
    numbers = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, numbers) or not 0 < value < float("inf"):
        raise ValueError(f"{name} must be a positive {'whole ' if kind is int else ''}number, not {value!r}")
