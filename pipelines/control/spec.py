"""A control image and the model that reads it, as users give them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffusers import ControlNetModel, T2IAdapter
from PIL import Image
from torch import Tensor

from lora_compose.attention.device import uncompiled

ControlImage = Image.Image | Tensor
"""An image, or a tensor as the model reads it, mostly 0 to 1. Shape: [(images,) channels, height, width]."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Control:
    """A control image and the model that reads it.

    Attributes:
        model: diffusers' `ControlNetModel` or `T2IAdapter`, on the device of the pipeline.
        image: The control image, as large as the canvas; a list has one per prompt.
        scale: Factor on its output; 0 switches it off.
        start: It acts from this part of the steps on.
        end: It acts until this part of the steps.
        regions: By name of a concept, the scale inside its region, instead of `scale`. Where regions overlap, the mean
            counts, and a cell of a coarse grid that a region covers partly has its part.
    """

    model: Any
    image: ControlImage | Sequence[ControlImage]
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    regions: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(uncompiled(self.model), ControlNetModel | T2IAdapter):
            raise TypeError(
                f"the model of a control is a ControlNetModel or a T2IAdapter of diffusers, not a "
                f"{type(self.model).__name__}; several make several controls: control=[Control(...), Control(...)]"
            )
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(
                f"a control acts between two parts of the steps, 0 <= start < end <= 1, not from {self.start} to "
                f"{self.end}"
            )
        for scale in (self.scale, *self.regions.values()):
            if not math.isfinite(scale):
                raise ValueError(f"the scale of a control must be a finite number, not {scale}")

    @property
    def is_off(self) -> bool:
        """Whether its scale is 0 everywhere."""
        return not any((self.scale, *self.regions.values()))

    def acts(self, step: int, steps: int) -> bool:
        """Whether it acts in a step, by diffusers' rule: if all of the step lies between start and end."""
        return step / steps >= self.start and (step + 1) / steps <= self.end


def controls_of(control: "Control | Sequence[Control] | None") -> tuple[Control, ...]:
    """The controls of a call as a tuple; raises TypeError for anything that is no `Control`."""
    several = isinstance(control, list | tuple)
    controls: tuple[Any, ...] = () if control is None else tuple(control) if several else (control,)
    for entry in controls:
        if not isinstance(entry, Control):
            raise TypeError(
                f"control takes a Control(model=..., image=...) or a list of them, not a {type(entry).__name__}"
            )
    return controls
