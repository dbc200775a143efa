"""Changes of a layer's own weight W that are no sum with it: DoRA rescales it, OFT rotates it.

With a matrix T and the low-rank change D of the same concept, the changed weight is T (W + D), or (W + D) T where T is
on the inputs. T is diagonal (DoRA) or orthogonal in blocks (OFT). A layer y = W x + b is linear in its own output, so

    T (W + D) x + b = y + (T - 1) (y - b) + T D x        (W + D) T x + b = y + W (T - 1) x + D T x

and a gate on what is added to y is exact: by row, token and cell, for any number of concepts, each relative to W.

- T on the outputs needs no more than the layer's output, in layers of every kind.
- T on the inputs of linear layers and of 1 x 1 convolutions changes the input: x + gate (T - 1) x, from which the layer
  makes y with the change. An output has the gate of the one cell that it reads.
- T on the inputs of larger convolutions, whose outputs read several cells, takes one more convolution for each concept,
  behind the gate of the cell that is written: with W of (T - 1) x, or with W T - W where blocks of T mix cells.

T of a DoRA is made from W once, when its bank is made. Sources: DoRA, arXiv 2402.09353; OFT, arXiv 2306.07280.
"""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_compose.attention.device import has_plain_weight, is_linear, to_device
from lora_compose.attention.gates import GateKey
from lora_compose.attention.sites import Site

MAX_FACTOR = 1000.0
"""The largest entry of T that is accepted; those of trained files are near 1."""
_SAMPLED = 64  # rows of a weight that are looked at to see whether it has changed
_PROBED = 512  # inputs at once, for layers that give their weight in no other way


@dataclass(frozen=True, eq=False)
class Rescaling:
    """The norms that a changed weight has in the end, along all its dimensions but one (DoRA).

    Attributes:
        values: The norms. Shape: [outputs] or [inputs].
        by_input: Whether they are of the inputs.
        fused: Names of the layers that are one layer in the file, whose columns have these norms together.
        current: The norms of those columns of W + D, once they are known (`column_norms.with_column_norms`).
    """

    values: Tensor
    by_input: bool = False
    fused: tuple[str, ...] = ()
    current: Tensor | None = None

    @property
    def size(self) -> int:
        """How many outputs, or inputs."""
        return len(self.values)

    def matrix(self, changed: Tensor) -> Tensor:
        """The diagonal of T in fp32, from `changed`, which is W + D in fp32. Shape: [outputs, inputs, ...]."""
        assert self.current is not None or not self.fused, "one layer does not have the norms of several"
        norms = self.current
        if norms is None:
            norms = changed.transpose(0, int(self.by_input)).flatten(1).norm(dim=1)
        # A row that is zero stays so, whatever it is multiplied by.
        return torch.where(norms > 0, to_device(self.values, norms.device).float() / norms, 0.0)


@dataclass(frozen=True, eq=False)
class Rotation:
    """Blocks on the diagonal of T, usually orthogonal (OFT).

    Attributes:
        values: The blocks. Shape: [blocks, size, size].
        by_input: Whether T is on the inputs, in convolutions on all numbers that one output reads.
        shared: Whether a single block is repeated for a whole layer.
        turned_back: Whether T is transposed in convolutions.
    """

    values: Tensor
    by_input: bool = False
    shared: bool = False
    turned_back: bool = False

    @property
    def size(self) -> int:
        """How many outputs, or inputs."""
        return len(self.values) * self.values.shape[-1]

    def matrix(self, changed: Tensor) -> Tensor:
        """The blocks of T in fp32, on the device of a weight."""
        return to_device(self.values, changed.device).float()


Transform = Rescaling | Rotation


class Applied(NamedTuple):
    """A transform as it is in the model.

    Attributes:
        change: T - 1: its diagonal, or its blocks; None if the factors have it.
        bias: The layer's bias, which T leaves alone.
        of: The weight from which T was made.
    """

    change: Tensor | None
    by_input: bool
    bias: Tensor | None
    of: "Version"


class Version(NamedTuple):
    """A weight at one time.

    Attributes:
        weight: The parameter.
        number: How often PyTorch has counted a change of it.
        sample: Some of its numbers, since changes of `weight.data` are not counted; None if it has none to show.
    """

    weight: "weakref.ref[Tensor]"
    number: int
    sample: Tensor | None

    def is_of(self, layer: nn.Module) -> bool:
        """Whether a layer still has that weight, perhaps in another place."""
        now = version_of(layer)
        same = now.weight() is self.weight()
        if now.sample is None or self.sample is None:
            return same and now.number == self.number
        if not torch.equal(now.sample, self.sample):
            return False
        return now.number == self.number or not same  # the count of another tensor, moved or offloaded, says nothing


def version_of(layer: nn.Module) -> Version:
    """The weight of a layer as it is now."""
    stored = _stored(layer, "weight")
    # Layers of some quantisation libraries have no parameter of that name.
    weight = layer._parameters.get("weight") if stored is not None else next(layer.parameters(), None)
    if weight is None:
        raise ValueError(f"the weight of a {type(layer).__name__} cannot be read")
    number = 0 if weight.is_inference() else weight._version
    if stored is None or stored.is_meta or type(stored) not in (nn.Parameter, Tensor):
        return Version(weakref.ref(weight), number, None)
    rows = stored.detach()[:: max(1, len(stored) // _SAMPLED)]
    column = rows if rows.dim() == 1 else rows.select(1, stored.shape[1] // 2)  # packed numbers may have no rows
    return Version(weakref.ref(weight), number, column.flatten().cpu().clone())


def applied(transform: Transform, delta: Tensor, layer: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Applied]:
    """T for a layer: its diagonal, or its blocks, in fp32; and what the layer's outputs take of it.

    Args:
        delta: D in fp32, where the model runs.
        layer: A linear layer or a convolution, without adapters.

    Raises:
        ValueError: If the weight is not to be had, or would be multiplied by too much.
    """
    matrix = transform.matrix(dense_weight(layer, delta.device, dtype) + delta)
    if not matrix.is_meta and not (largest := float(matrix.abs().max())) <= MAX_FACTOR:
        raise ValueError(
            f"the model's weight would be multiplied by {largest:.3g}; expected at most {MAX_FACTOR:g}, since trained "
            "files have factors near 1: the file is damaged, or for another model"
        )
    identity = 1.0 if matrix.dim() == 1 else torch.eye(matrix.shape[-1], device=matrix.device)
    bias = _stored(layer, "bias")
    bias = None if bias is None else to_device(bias, delta.device).to(dtype)
    return matrix, Applied((matrix - identity).to(dtype), transform.by_input, bias, version_of(layer))


def dense_weight(layer: nn.Module, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The weight of a layer in fp32, dequantised, also if it is kept outside of the layer.

    A linear layer of another class tells its weight by what it makes of unit vectors.

    Args:
        layer: A linear layer or a convolution, without adapters.
        device: Where the result is.
        dtype: The precision of the layer's inputs.

    Raises:
        ValueError: If the weight is not to be had.
    """
    weight = _stored(layer, "weight")
    if weight is not None and weight.is_meta and device.type != "meta":
        raise ValueError("the model has no weights, but shapes alone")
    if weight is not None and has_plain_weight(layer, weight):
        return to_device(weight.detach(), device).float()
    if not is_linear(layer):
        raise ValueError(f"the weight of a quantised {type(layer).__name__} cannot be read")
    width, rows = int(layer.in_features), []  # pyright: ignore[reportArgumentType]
    own = next((parameter.device for parameter in layer.parameters()), device)
    place: dict[str, Any] = {"device": device if own.type == "meta" else own, "dtype": dtype}
    with torch.no_grad():
        bias = layer(torch.zeros(1, width, **place)).float()
        for start in range(0, width, _PROBED):
            count = min(_PROBED, width - start)
            unit = torch.zeros(count, width, **place)
            unit[:, start : start + count].fill_diagonal_(1)
            rows.append(to_device(layer(unit).float() - bias, device))
    return torch.cat(rows).T


def _stored(layer: nn.Module, name: str) -> Tensor | None:
    """A parameter, also under sequential offload, which keeps the numbers outside of the layer."""
    parameter, hook = layer._parameters.get(name), getattr(layer, "_hf_hook", None)
    kept = getattr(hook, "weights_map", None)
    return parameter if parameter is None or not parameter.is_meta or kept is None else kept[name].detach()


def transformed(matrix: Tensor, weight: Tensor, by_input: bool) -> Tensor:
    """The weight W [outputs, inputs, ...] with a transform on its outputs (T W), or on its inputs (W T).

    `matrix` is the diagonal of T, or its blocks.
    """
    if by_input and matrix.dim() == 3:
        return _in_blocks(matrix.mT, weight.flatten(1)).view(weight.shape)
    axis = int(by_input)
    moved = weight.movedim(axis, -1)
    if matrix.dim() == 1:
        return (moved * matrix).movedim(-1, axis)
    return _in_blocks(matrix, moved).movedim(-1, axis)


def _in_blocks(blocks: Tensor, values: Tensor) -> Tensor:
    """Blocks times the last dimension of values."""
    return torch.einsum("nij,...nj->...ni", blocks, values.unflatten(-1, (len(blocks), -1))).flatten(-2)


class Side(nn.Module):
    """Transforms on one side of a layer: diagonals of several concepts, or the blocks of one.

    Args:
        changes: T - 1 of each concept, in the order of the concepts.

    Attributes:
        change: Shape: [concepts, size], or [blocks, size, size] for the blocks of one.
    """

    change: Tensor

    def __init__(self, changes: list[Tensor], key: GateKey) -> None:
        super().__init__()
        self.key = key
        self.diagonal = changes[0].dim() == 1
        self.register_buffer("change", torch.stack(changes) if self.diagonal else changes[0], persistent=False)

    def forward(self, out: Tensor, values: Tensor, gate: Tensor) -> Tensor:
        """Adds gate * (T - 1) values to an output, which is not changed.

        Args:
            out: Shape: as values.
            values: Shape: [..., size], or [rows, size, height, width] of a convolution.
            gate: Shape: as `Gates.expand` gives it.
        """
        change, gate = self.change.to(values.dtype), gate.to(values.dtype)
        if self.diagonal and self.key.convolution:
            return torch.addcmul(out, F.conv2d(gate, change.t()[:, :, None, None]), values)
        if self.diagonal:
            return torch.addcmul(out, gate @ change, values)
        if self.key.convolution:
            return out + gate * _in_blocks(change, values.movedim(1, -1)).movedim(-1, 1)
        return out + gate * _in_blocks(change, values)


class Transforms(nn.Module):
    """The transforms of all concepts in one layer.

    Args:
        pointwise: Whether each output reads one position of the input, that of its gate.

    Attributes:
        of: The weights from which they were made.
    """

    bias: Tensor | None

    def __init__(
        self, by_concept: Mapping[int, Applied], site: Site, convolution: bool, pointwise: bool, concepts: int
    ) -> None:
        super().__init__()
        changes = {i: transform.change for i, transform in by_concept.items() if transform.change is not None}
        rescaled = [i for i, change in changes.items() if change.dim() == 1 and not by_concept[i].by_input]
        groups = [*([rescaled] if rescaled else []), *([i] for i in changes if i not in rescaled)]
        sides = []
        for group in groups:
            key = GateKey(site, convolution, tuple([int(i in group) for i in range(concepts)]))
            sides.append(Side([changes[i] for i in group], key))
        self.sides = nn.ModuleList(sides)  # so that `.to()` reaches them
        self._sides = sides
        self._places = {i: (n, group.index(i)) for n, group in enumerate(groups) for i in group}
        self._outputs = [side for side, (i, *_) in zip(sides, groups, strict=True) if not by_concept[i].by_input]
        self._inputs = [side for side, (i, *_) in zip(sides, groups, strict=True) if by_concept[i].by_input]
        first, *_ = by_concept.values()
        self.register_buffer("bias", first.bias, persistent=False)
        self.keys = tuple(side.key for side in sides)
        self.of = {i: transform.of for i, transform in by_concept.items()}
        self._by_input = {i for i, transform in by_concept.items() if transform.by_input}
        self.in_the_input = pointwise and not self._outputs

    def get(self, index: int) -> Applied | None:
        """The transform of one concept, without copying it; None if it has none."""
        if index not in self.of:
            return None
        if index not in self._places:
            return Applied(None, True, self.bias, self.of[index])
        number, row = self._places[index]
        side = self._sides[number]
        change = side.change[row] if side.diagonal else side.change
        return Applied(change, index in self._by_input, self.bias, self.of[index])

    def moved(self, x: Tensor, gates: Mapping[GateKey, Tensor]) -> Tensor:
        """Returns x + gate (T - 1) x, whose output already has the change; only where all are `in_the_input`."""
        moved = x
        for side in self._inputs:
            moved = side(moved, x, gates[side.key])
        return moved

    def add(
        self, out: Tensor, x: Tensor, layer: Callable[[Tensor], Tensor], alone: bool, gates: Mapping[GateKey, Tensor]
    ) -> Tensor:
        """Adds the gated changes to an output, which is not changed.

        Args:
            layer: The layer without adapters.
            alone: Whether the output is the layer's alone; what other adapters added is not transformed.
        """
        if self._outputs:
            base = self._without_bias(out if alone else layer(x))
            for side in self._outputs:
                out = side(out, base, gates[side.key])
        for side in self._inputs:
            change = layer(side(torch.zeros_like(x), x, x.new_ones([1] * x.dim())))
            out = out + gates[side.key].to(out.dtype) * self._without_bias(change)
        return out

    def _without_bias(self, out: Tensor) -> Tensor:
        if self.bias is None:
            return out
        bias = self.bias.to(out.dtype)
        return out - (bias[:, None, None] if self.keys[0].convolution else bias)
