"""Gates: how strongly each concept's LoRA acts on every batch row, token and image cell of one UNet pass."""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lora_compose.attention.layers import Grid, Kind, Place


class GateKey(NamedTuple):
    """What a bank layer asks for; layers with equal keys share one expanded tensor."""

    place: Place
    convolution: bool
    ranks: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Gates:
    """Factors on the LoRA deltas of `concepts` concepts during one UNet pass.

    Weights are part of the factors. Every dimension may be 1 and is then broadcast; rows are ordered (uncond, cond)
    and a tensor that treats them differently has all of them.

    Attributes:
        text: For keys and values of cross-attention. Shape: [rows, tokens, concepts], or [texts, rows, tokens,
            concepts] where cells choose among several texts.
        image: For everything that sees image cells, by level. Shape: [rows, cells, concepts], cells in row-major order.
        row: For layers that see neither (time embedding). Shape: [rows, concepts].
        latent_grid: Height and width of the latents.
        read: For the output of cross-attention, by level; None is as `image`. Shape: as image, with readers in place of
            cells where cells choose among several texts (`Readers`).
    """

    text: Tensor
    image: Mapping[int, Tensor]
    row: Tensor
    latent_grid: Grid
    read: Mapping[int, Tensor] | None = None

    def select(self, rows: slice) -> "Gates":
        """The same gates for some of the rows."""

        def cut(gate: Tensor, dim: int = -3) -> Tensor:
            chosen = [slice(None)] * gate.dim()
            chosen[dim] = rows
            return gate if gate.shape[dim] == 1 else gate[tuple(chosen)]

        image = {level: cut(gate) for level, gate in self.image.items()}
        read = None if self.read is None else {level: cut(gate) for level, gate in self.read.items()}
        return Gates(cut(self.text), image, cut(self.row, dim=-2), self.latent_grid, read)

    def among(self, columns: Sequence[int], concepts: int) -> "Gates":
        """The same gates among more concepts, which do not act.

        Args:
            columns: Which of them these are.
            concepts: How many there are.
        """
        return self._each(lambda gate: among(gate, columns, concepts))

    def times(self, factors: Tensor) -> "Gates":
        """The same gates times a factor on each concept. Shape: [concepts]."""
        return self._each(lambda gate: gate * factors)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Gates":
        """Gates that are changed one by one."""
        return Gates(
            change(self.text),
            {level: change(gate) for level, gate in self.image.items()},
            change(self.row),
            self.latent_grid,
            None if self.read is None else {level: change(gate) for level, gate in self.read.items()},
        )

    def of(self, place: Place) -> Tensor:
        """The gate that rules a place.

        Raises:
            KeyError: If there is none: a missing gate is an error, never "ungated".
        """
        image = self.read if place.reads and self.read is not None else self.image
        gate: Mapping[Kind, Tensor | Mapping[int, Tensor]] = {"text": self.text, "image": image, "row": self.row}
        found = gate[place.kind]
        return found if isinstance(found, Tensor) else found[place.level]

    def expand(self, key: GateKey, grid: Grid) -> Tensor:
        """The factor on the pooled rank activations of one kind of layer.

        Returns:
            Shape: [(texts,) rows, tokens or cells, sum of ranks] for linear layers, [rows, sum of ranks, height,
            width] for convolutions, [rows, sum of ranks] for "row" places.
        """
        gate = self.of(key.place)
        # Not by an index of ranks, which would have to be copied to the device.
        each = [gate[..., i, None].expand(*gate.shape[:-1], rank) for i, rank in enumerate(key.ranks)]
        gate = torch.cat(each, dim=-1)
        if not key.convolution:
            return gate.contiguous()
        gate = gate.transpose(1, 2)
        height, width = grid if gate.shape[-1] > 1 else (1, 1)
        return gate.reshape(*gate.shape[:2], height, width)


def among(by_concept: Tensor, columns: Sequence[int], concepts: int) -> Tensor:
    """Numbers for some concepts as numbers for more of them, 0 at the others. Shape: [..., concepts]."""
    every = [by_concept.new_zeros(by_concept.shape[:-1])] * concepts
    for column, mine in zip(columns, by_concept.unbind(dim=-1), strict=True):
        every[column] = mine
    return torch.stack(every, dim=-1)


class Derived:
    """Gates made from others, the same objects for as long as those live, so that nothing is built again per step.

    Gates that share the one for the text go on to share it, and with it keys and values.
    """

    def __init__(self) -> None:
        self._gates: WeakKeyDictionary[Gates, Gates] = WeakKeyDictionary()
        self._text: MutableMapping[Tensor, Tensor] = WeakIdKeyDictionary()

    def of(self, gates: Gates, make: Callable[[Gates], Gates]) -> Gates:
        """What is made of some gates, at the first time."""
        if gates not in self._gates:
            made = make(gates)
            self._gates[gates] = replace(made, text=self._text.setdefault(gates.text, made.text))
        return self._gates[gates]

    def clear(self) -> None:
        """Forgets all of them."""
        self._gates.clear()
        self._text.clear()
