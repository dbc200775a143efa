"""The factors of a composition as a model of ComfyUI: counted, moved and evicted by it beside the one they act in."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from lora_compose.attention import Bank, Lora, Site, bank_for
from lora_compose.attention.lora_bank import BankLayer

OTHER_CELLS = (
    "another node changes the cells that layers see, as HyperTile and PatchModelAddDownscale do: take it out, or use "
    "merge or tara"
)


class MovableFactors(nn.Module):
    """The bank of a composition. It has no parameters, so ComfyUI loads it as a whole, or leaves it where it is.

    Args:
        loras: The factors of each concept.
        device: Where it is until it is loaded.

    Attributes:
        bank: None until it is first used.
        place: Empty, and where the bank is or will be made.
    """

    place: Tensor

    def __init__(self, loras: Sequence[Lora], device: torch.device) -> None:
        super().__init__()
        self.device, self.loras = device, loras
        self.bank: Bank | None = None
        self.register_buffer("place", torch.empty(0, device=device), persistent=False)

    def bytes_in(self, dtype: torch.dtype) -> int:
        """The memory that it takes in a precision."""
        return sum(factors.size_in_model for lora in self.loras for factors in lora.values()) * dtype.itemsize

    def bank_for(self, model: nn.Module, sites: Mapping[str, Site], dtype: torch.dtype) -> Bank:
        """The bank; a new one if the precision, or a weight that DoRA needs, has changed."""
        self.bank = bank_for(model, self.loras, sites, device=self.place.device, dtype=dtype, known=self.bank)
        return self.bank

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `.to()` calls. An installed layer of the bank has a layer of the model inside, which stays."""
        super()._apply(fn, recurse)
        for layer in self.bank.layers.values() if self.bank is not None else ():
            inside = layer._modules.pop("layer", None)
            layer._apply(fn)
            if inside is not None:
                layer._modules["layer"] = inside
        return self


@dataclass(frozen=True, eq=False)
class Brought:
    """A bank layer whose factors are copied to its input in each call, if ComfyUI leaves them elsewhere."""

    layer: BankLayer

    def __call__(self, x: Tensor) -> Any:
        """The layer's output. Raises ValueError if gates are for other cells than those of the input."""
        try:
            if self.layer.up.device == x.device:
                return self.layer(x)
            factors = {
                name: factor.to(x.device)
                for name, factor in self.layer.named_buffers()
                if not name.startswith("layer.")  # that of the model
            }
            return torch.func.functional_call(self.layer, factors, (x,))
        except RuntimeError as error:
            if self._fits(x):
                raise
            raise ValueError(OTHER_CELLS) from error

    def _fits(self, x: Tensor) -> bool:
        """Whether gates have the rows and cells of an output, or one for all."""
        (key, *_), channels = self.layer.keys, 1 if self.layer.key.convolution else -1
        gate, out = (values.select(channels, 0).shape for values in (self.layer.gates[key], self.layer.base(x)))
        return all(of_gate in (1, side) for of_gate, side in zip(reversed(gate), reversed(out), strict=False))


@dataclass(frozen=True, eq=False)
class OnKnownGrid:
    """A group normalisation by region that says so where another node has changed its grid."""

    norm: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        """The layer's output."""
        try:
            return self.norm(x)
        except KeyError as error:  # there are no regions for the grid
            raise ValueError(OTHER_CELLS) from error
