"""All concepts' LoRA factors pooled per layer: one low-rank product whatever the number of concepts.

With `A = [A_1; A_2; ...]` (sum of ranks x inputs) and `B = [s_1 B_1 | s_2 B_2 | ...]` (outputs x sum of ranks),
s = alpha / rank,

    y = base(x) + ((x A^T) * G) B^T

where G holds every concept's gate repeated over its ranks. All ones is the plain sum of LoRAs, a token mask on the keys
and values of cross-attention is TARA, an image mask is a regional LoRA, one value per row is one LoRA per branch.

A Kronecker product K (x) (up down) (LoKr) has too much rank for that. It is applied as its small factors, one concept
after the other. What DoRA and OFT do with the layer's own weight is gated beside it (`transforms.py`).
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_compose.attention.device import to_device
from lora_compose.attention.forward_state import ForwardState
from lora_compose.attention.gates import GateKey
from lora_compose.attention.sites import Site
from lora_compose.attention.swapped_forward import SwappedForward
from lora_compose.attention.transforms import (
    Applied,
    Rotation,
    Transform,
    Transforms,
    applied,
    dense_weight,
    transformed,
)


@dataclass(frozen=True, eq=False)
class LoraFactors:
    """A concept's low-rank change of one layer, `scale * up @ down`, or its Kronecker product with a small matrix.

    Attributes:
        down: Shape: [rank, inputs], or [rank, inputs, kernel height, kernel width] for a convolution.
        up: Shape: [outputs, rank], or [outputs, rank, 1, 1] for a convolution.
        scale: alpha / rank.
        left: The change is kron(left, scale * up @ down), of a linear layer; None means a left of [[1]]. Shape: [outer
            outputs, outer inputs].
        transform: The concept's change of the layer's own weight, and of this change; None means none. With it,
            the rank may be 0.
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0
    left: Tensor | None = None
    transform: Transform | None = None

    @property
    def rank(self) -> int:
        """Rank of the delta, or a bound on it."""
        return self.down.shape[0] * (1 if self.left is None else min(self.left.shape))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All factors."""
        optional = self.left, None if self.transform is None else self.transform.values
        return (self.down, self.up, *(tensor for tensor in optional if tensor is not None))

    @property
    def _mixes_cells(self) -> bool:
        """Whether its transform mixes the cells that a convolution reads."""
        rotates = isinstance(self.transform, Rotation) and self.transform.by_input
        return rotates and math.prod(self.down.shape[2:]) > 1

    @property
    def size_in_model(self) -> int:
        """How many numbers it has in a model (`in_model`)."""
        if self._mixes_cells:
            outputs = self.up.shape[0]
            return outputs * (math.prod(self.down.shape[1:]) + outputs)
        return sum(tensor.numel() for tensor in self.tensors)

    def in_model(self, device: torch.device, dtype: torch.dtype, layer: nn.Module | None = None) -> "LayerFactors":
        """The factors where and as the model runs; the scale is in `up`, multiplied in fp32.

        Args:
            layer: The layer; needed by a transform.

        Raises:
            ValueError: If its weight is not to be had, or it would be multiplied by too much.
        """
        down, up = to_device(self.down, device), to_device(self.up, device).float() * self.scale
        left = None if self.left is None else to_device(self.left, device)
        if self.transform is None:
            return LayerFactors(down.to(dtype), up.to(dtype), None if left is None else left.to(dtype))
        assert layer is not None
        if self._mixes_cells and isinstance(self.transform, Rotation):
            return self._as_convolution(self.transform, device, dtype, base_layer(layer))
        matrix, transform = applied(self.transform, self.delta_on(device), base_layer(layer), dtype)
        if self.transform.by_input:
            down = transformed(matrix, down.float(), True)
        elif left is None:
            up = transformed(matrix, up, False)
        return LayerFactors(down.to(dtype), up.to(dtype), None if left is None else left.to(dtype), transform)

    def _as_convolution(
        self, rotation: Rotation, device: torch.device, dtype: torch.dtype, layer: nn.Module
    ) -> "LayerFactors":
        """W T - W + D T of a convolution whose cells T mixes, as factors: itself, and 1 for each output."""
        weight, delta = dense_weight(layer, device, dtype), self.delta_on(device)
        matrix, transform = applied(rotation, delta, layer, dtype)
        change = transformed(matrix, weight + delta, True) - weight
        ones = torch.eye(len(change), device=device, dtype=dtype)[:, :, None, None]
        return LayerFactors(change.to(dtype), ones, transform=transform._replace(change=None))

    def delta(self) -> Tensor:
        """The low-rank change of the weight, dense, in fp32 and in the weight's shape; without the transform."""
        return self.delta_on(self.down.device)

    def delta_on(self, device: torch.device) -> Tensor:
        """The change that `delta` gives, on a device."""
        down, up = to_device(self.down, device).float(), to_device(self.up, device).float()
        product = (self.scale * up.flatten(1) @ down.flatten(1)).view(up.shape[0], *down.shape[1:])
        return product if self.left is None else torch.kron(to_device(self.left, device).float(), product)

    def change_of(self, weight: Tensor) -> Tensor:
        """The dense change of a layer's weight, transform included, on the weight's device.

        Args:
            weight: In fp32. Without a transform the change does not depend on it.
        """
        delta = self.delta_on(weight.device)
        if self.transform is None:
            return delta
        changed = weight + delta
        return transformed(self.transform.matrix(changed), changed, self.transform.by_input) - weight


class LayerFactors(NamedTuple):
    """The factors of one concept in one layer, as they are in the model.

    Attributes:
        up: As in `LoraFactors`, with the scale.
        transform: As in `LoraFactors`, made for the layer; the factors have it, but those of a Kronecker product.
    """

    down: Tensor
    up: Tensor
    left: Tensor | None = None
    transform: Applied | None = None


Lora = Mapping[str, LoraFactors]
"""A concept's factors by name of the layer they change."""


class Kronecker(nn.Module):
    """The change of one concept that is a Kronecker product.

    Attributes:
        down: Shape: [rank, inner inputs].
        up: Shape: [inner outputs, rank].
        left: Shape: [outer outputs, outer inputs].
        rescaled: By how much each output is multiplied; None if by nothing. Shape: [outputs].
    """

    down: Tensor
    up: Tensor
    left: Tensor
    rescaled: Tensor | None

    def __init__(self, part: LayerFactors, key: GateKey) -> None:
        super().__init__()
        self.key = key
        change = None if part.transform is None else part.transform.change
        rescaled = None if change is None else 1 + change
        named = {"down": part.down, "up": part.up, "left": part.left, "rescaled": rescaled}
        for name, tensor in named.items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """The gated change. Shape: [..., inputs] -> [..., outputs]."""
        inner = F.linear(x.unflatten(-1, (-1, self.down.shape[1])), self.down) * gate.unsqueeze(-2)
        change = F.linear(self.left @ inner, self.up).flatten(-2)
        return change if self.rescaled is None else change * self.rescaled


class Stack(nn.Module):
    """The factors before the gate of several layers that read the same input (`share_input`).

    Args:
        down: Factors of all layers, one below the other. Shape: [sum of ranks of all layers, inputs, ...].
    """

    down: Tensor

    def __init__(self, down: Tensor) -> None:
        super().__init__()
        self.register_buffer("down", down, persistent=False)


class BankLayer(nn.Module):
    """Adds the gated LoRAs of all concepts to the output of one adapted layer, while they are installed.

    It stands in the layer's place, or acts on its `forward`; not as a forward hook, since `torch.compile` may reuse a
    graph that was compiled without the hook, and so drop the LoRA silently. In its place it has the layer as its child,
    which is so still reached by `.to()` and by offloading.

    Args:
        parts: The factors of each concept that changes this layer, by its index (`LoraFactors.in_model`).
        concepts: How many concepts there are in all.

    Attributes:
        layer: The layer as found, while concepts are installed: linear, convolution, or a PEFT layer around one of
            them.
        original_forward: The layer's `forward` as found, if this one acts on that; None if it stands in its place.
        key: The gates of the low-rank products.
        stack: Factors before the gate, beside those of layers with the same input; None if the layer has its own.
        rows: The slice of the stack that is of this layer.
        up: All concepts' factors after the gate. Shape: [outputs, sum of ranks, ...].
        keys: All gates that are needed, those of Kronecker products included.
        products: Changes that are Kronecker products, by concept.
        transforms: Changes of the layer's own weight; None without any.
    """

    layer: nn.Module
    original_forward: Callable[[Tensor], Tensor] | None = None
    own_down: Tensor
    stack: Stack | None
    rows = slice(None)
    up: Tensor

    def __init__(self, parts: Mapping[int, LayerFactors], site: Site, concepts: int, state: ForwardState) -> None:
        super().__init__()
        thin = {index: part for index, part in parts.items() if part.left is None}
        ranked = any(len(part.down) for part in thin.values())  # a transform may have no factors beside it
        sample = next(iter((thin or parts).values()))
        if not thin:  # of the right size, for what looks at it
            sides = [a * b for a, b in zip(sample.left.shape, (len(sample.up), sample.down.shape[1]), strict=True)]  # pyright: ignore[reportOptionalMemberAccess]
            sample = LayerFactors(sample.down.new_empty(0, sides[1]), sample.up.new_empty(sides[0], 0))
        ranks = _ranks(thin, concepts)
        self.key = GateKey(site, sample.down.dim() == 4, ranks)
        self._state = state
        downs, ups = [part.down for part in thin.values()], [part.up for part in thin.values()]
        self.register_buffer("own_down", torch.cat(downs or [sample.down]), persistent=False)
        self.register_buffer("up", torch.cat(ups or [sample.up], dim=1), persistent=False)
        self.stack = None
        self.products = {
            i: Kronecker(part, GateKey(site, False, _ranks({i: part}, concepts)))
            for i, part in parts.items()
            if part.left is not None
        }
        if self.products:
            self.kronecker = nn.ModuleList(self.products.values())  # so that `.to()` reaches them
        changes = {index: part.transform for index, part in parts.items() if part.transform is not None}
        pointwise = sample.down.shape[2:] in ((), (1, 1))
        self.transforms = Transforms(changes, site, self.key.convolution, pointwise, concepts) if changes else None
        self.keys = (*((self.key,) if ranked else ()), *(product.key for product in self.products.values()))
        self.keys += () if self.transforms is None else self.transforms.keys
        self.ranked = ranked
        self.concepts = frozenset(parts)
        self.weight_shape = (sample.up.shape[0], *sample.down.shape[1:])

    def act_on(self, layer: nn.Module, original_forward: Callable[[Tensor], Tensor] | None = None) -> None:
        """Takes a layer as its child, and its mode. Without `nn.Module.__setattr__`, which costs more than the rest.

        Args:
            original_forward: The layer's `forward`, if this one acts on that.
        """
        self._modules["layer"] = layer
        self.__dict__.update(training=layer.training, original_forward=original_forward)

    def let_go(self) -> None:
        """Holds no layer any more."""
        self._modules.pop("layer", None)
        self.__dict__.pop("original_forward", None)

    @property
    def down(self) -> Tensor:
        """All concepts' factors before the gate. Shape: [sum of ranks, inputs, ...]."""
        return self.own_down if self.stack is None else self.stack.down[self.rows]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All factors."""
        more = [*self.products.values(), *(() if self.transforms is None else (self.transforms,))]
        return self.down, self.up, *(tensor for module in more for tensor in module.buffers())

    def factors(self, index: int) -> LayerFactors:
        """The factors of one concept, without copying them."""
        transform = None if self.transforms is None else self.transforms.get(index)
        if (product := self.products.get(index)) is not None:
            return LayerFactors(product.down, product.up, product.left, transform)
        start, rank = sum(self.key.ranks[:index]), self.key.ranks[index]
        return LayerFactors(self.down.narrow(0, start, rank), self.up.narrow(1, start, rank), transform=transform)

    def only(self, concepts: Collection[int]) -> "BankLayer":
        """A layer with the factors of some of these concepts alone."""
        parts = {index: self.factors(index) for index in sorted(self.concepts & set(concepts))}
        return BankLayer(parts, self.key.site, len(self.key.ranks), self._state)

    @property
    def weight(self) -> Tensor:
        """The weight of the layer as found, for code that looks at it."""
        return base_layer(self.layer).get_parameter("weight")

    @property
    def bias(self) -> Tensor | None:
        """The bias of the layer as found."""
        return getattr(base_layer(self.layer), "bias", None)

    @property
    def gates(self) -> Mapping[GateKey, Tensor]:
        """The gates of the current pass."""
        return self._state.inputs.gates

    def base(self, x: Tensor) -> Tensor:
        """The output of the layer as found."""
        return self.layer(x) if self.original_forward is None else self.original_forward(x)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output plus the gated deltas of all concepts. Raises KeyError if no gate was set for its kind."""
        if self.transforms is not None and self.transforms.in_the_input and base_layer(self.layer) is self.layer:
            return self._add_factors(self.base(self.transforms.moved(x, self.gates)), x)
        return self.add(self.base(x), x)

    def add(self, out: Tensor, x: Tensor) -> Tensor:
        """Adds the gated deltas of all concepts to an output of the layer, which may be changed in place."""
        if self.transforms is not None:
            alone = base_layer(self.layer) is self.layer
            out = self.transforms.add(out, x, self.base if alone else base_layer(self.layer), alone, self.gates)
        return self._add_factors(out, x)

    def _add_factors(self, out: Tensor, x: Tensor) -> Tensor:
        gates, up = self.gates, self.up
        for product in self.products.values():
            out = out + product(x.to(up.dtype), gates[product.key]).to(out.dtype)
        if not self.ranked:
            return out
        gate = gates[self.key]
        if self.key.convolution:
            base = base_layer(self.layer)
            hidden = F.conv2d(x, self.down, stride=base.stride, padding=base.padding, dilation=base.dilation)  # pyright: ignore[reportArgumentType, reportCallIssue]
            return out + F.conv2d(hidden * gate, up)
        # Quantised layers take inputs of any precision, so these may differ from that of the model.
        return _added(out, F.linear(x.to(up.dtype), self.down) * gate, up)


def _added(out: Tensor, hidden: Tensor, up: Tensor) -> Tensor:
    """Adds deltas to the output of a linear layer. Shape of hidden: [..., sum of ranks]."""
    if out.dtype != up.dtype or not out.is_contiguous():  # the same, or autocast; or another program's output
        return out + F.linear(hidden, up).to(out.dtype)
    flat, hidden = out.view(-1, out.shape[-1]), hidden.view(-1, hidden.shape[-1])
    if out.requires_grad:  # autograd refuses changes of what quantised layers give
        return torch.addmm(flat, hidden, up.t()).view(out.shape)
    flat.addmm_(hidden, up.t())  # a third less time than a separate addition
    return out


def bank_layer_of(module: nn.Module) -> BankLayer | None:
    """The bank layer that stands in a module's place, or acts on its `forward` and nothing else does; None without one.

    Hooks of a module belong to each of its calls, so one that has some is run by itself.
    """
    if isinstance(module, BankLayer):
        return module
    forward = module.forward
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return forward.layer if isinstance(forward, SwappedForward) and not hooked else None


def share_input(layers: Sequence[BankLayer]) -> None:
    """Stacks the factors before the gate of layers that read the same input, if they ask for the same gates alone."""
    first = layers[0]
    if any(layer.products or layer.transforms is not None or layer.key != first.key for layer in layers):
        return
    stack = Stack(torch.cat([layer.down for layer in layers]))
    for i, layer in enumerate(layers):
        rank = sum(layer.key.ranks)
        layer.stack, layer.rows = stack, slice(i * rank, (i + 1) * rank)
        layer.register_buffer("own_down", None)


def outputs_of(layers: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """The outputs of linear layers that read the same input, with one product before the gate if they share a stack.

    `layers` are all of a stack, or any others; `x` has the shape [..., inputs].
    """
    bank = [layer for layer in map(bank_layer_of, layers) if layer is not None]
    stack = bank[0].stack if bank else None
    if stack is None or len(bank) < len(layers) or not all(layer.stack is stack for layer in bank):
        return [layer(x) for layer in layers]
    down, gate = stack.down, bank[0].gates[bank[0].key]
    hidden = F.linear(x.to(down.dtype), down).unflatten(-1, (len(bank), -1)) * gate.unsqueeze(-2)
    return [_added(layer.base(x), gated, layer.up) for layer, gated in zip(bank, hidden.unbind(-2), strict=True)]


def _ranks(parts: Mapping[int, LayerFactors], concepts: int) -> tuple[int, ...]:
    return tuple([len(parts[index].down) if index in parts else 0 for index in range(concepts)])


def base_layer(layer: nn.Module) -> nn.Module:
    """The layer inside a PEFT layer, or the layer itself."""
    inner = layer._modules.get("base_layer")
    return layer if inner is None else inner
