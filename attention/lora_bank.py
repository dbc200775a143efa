"""All concepts' LoRA factors pooled per layer: one low-rank product whatever the number of concepts.

With `A = [A_1; A_2; ...]` (sum of ranks x inputs) and `B = [s_1 B_1 | s_2 B_2 | ...]` (outputs x sum of ranks),
s = alpha / rank,

    y = base(x) + ((x A^T) * G) B^T

where G holds every concept's gate repeated over its ranks. All ones is the plain sum of LoRAs, a token mask on the keys
and values of cross-attention is TARA, an image mask is a regional LoRA, one value per row is one LoRA per branch.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_compose.attention.device import to_device
from lora_compose.attention.forward_state import ForwardState
from lora_compose.attention.gates import GateKey
from lora_compose.attention.sites import Site


@dataclass(frozen=True, eq=False)
class LoraFactors:
    """A concept's low-rank change of one layer: `scale * up @ down`.

    Attributes:
        down: Shape: [rank, inputs], or [rank, inputs, kernel height, kernel width] for a convolution.
        up: Shape: [outputs, rank], or [outputs, rank, 1, 1] for a convolution.
        scale: alpha / rank.
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """Rank of the delta."""
        return self.down.shape[0]

    def parts(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Both factors where and as the model runs; the scale is in the second, multiplied in fp32."""
        up = to_device(self.up, device).float()
        return to_device(self.down, device).to(dtype), (up * self.scale).to(dtype)

    def delta(self) -> Tensor:
        """The dense change of the weight, in fp32 and in the weight's shape."""
        down, up = self.down.float(), self.up.float()
        return (self.scale * up.flatten(1) @ down.flatten(1)).view(up.shape[0], *down.shape[1:])


Lora = Mapping[str, LoraFactors]
"""A concept's factors by name of the layer they change."""


class BankLayer(nn.Module):
    """Stands in for one adapted layer while concepts are installed, and keeps it as its child.

    A replaced module rather than a forward hook, since `torch.compile` may reuse a graph that was compiled without the
    hook, and so drop the LoRA silently. As a child, the layer is still reached by `.to()` and by offloading.

    Args:
        parts: The factors of each concept that changes this layer, by its index (`LoraFactors.parts`).
        site: Stream and grid of the layer.
        concepts: How many concepts there are in all.
        state: Holds the gates of the current pass.

    Attributes:
        layer: The layer as found, while this one stands in for it: linear, convolution, or a PEFT layer around one of
            them.
        key: What it asks of gates.
        A: All concepts' factors before the gate. Shape: [sum of ranks, inputs, ...].
        B: Those after it. Shape: [outputs, sum of ranks, ...].
        weight_shape: The shape of the weight that it can change.
    """

    layer: nn.Module
    A: Tensor
    B: Tensor

    def __init__(
        self, parts: Mapping[int, tuple[Tensor, Tensor]], site: Site, concepts: int, state: ForwardState
    ) -> None:
        super().__init__()
        downs, ups = zip(*parts.values(), strict=True)
        ranks = tuple([len(parts[index][0]) if index in parts else 0 for index in range(concepts)])
        self.key = GateKey(site, downs[0].dim() == 4, ranks)
        self._state = state
        self.register_buffer("A", torch.cat(downs), persistent=False)
        self.register_buffer("B", torch.cat(ups, dim=1), persistent=False)
        self.weight_shape = (ups[0].shape[0], *downs[0].shape[1:])

    def stand_in_for(self, layer: nn.Module) -> None:
        """Takes a layer as its child, and its mode. Without `nn.Module.__setattr__`, which costs more than the rest."""
        self._modules["layer"] = layer
        self.__dict__["training"] = layer.training

    def part(self, index: int) -> tuple[Tensor, Tensor]:
        """The factors of one concept, without copying them."""
        start, rank = sum(self.key.ranks[:index]), self.key.ranks[index]
        return self.A.narrow(0, start, rank), self.B.narrow(1, start, rank)

    def only(self, concepts: Collection[int]) -> "BankLayer":
        """The same with the factors of some of its concepts alone."""
        ranks = self.key.ranks
        parts = {index: self.part(index) for index, rank in enumerate(ranks) if rank and index in concepts}
        return BankLayer(parts, self.key.site, len(ranks), self._state)

    @property
    def weight(self) -> Tensor:
        """The weight of the layer as found, for code that looks at it."""
        return base_layer(self.layer).get_parameter("weight")

    @property
    def bias(self) -> Tensor | None:
        """The bias of the layer as found."""
        return getattr(base_layer(self.layer), "bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output plus the gated deltas of all concepts.

        Raises:
            KeyError: If no gate was set for this kind of layer.
        """
        out = self.layer(x)
        gate = self._state.inputs.gates[self.key]
        if self.key.convolution:
            base = base_layer(self.layer)
            hidden = F.conv2d(x, self.A, stride=base.stride, padding=base.padding, dilation=base.dilation)  # pyright: ignore[reportArgumentType, reportCallIssue]
            return out + F.conv2d(hidden * gate, self.B)
        hidden = F.linear(x, self.A) * gate
        if out.dtype != self.B.dtype:  # autocast
            return out + F.linear(hidden, self.B)
        # In place: a third less time than a separate addition.
        out.view(-1, out.shape[-1]).addmm_(hidden.view(-1, hidden.shape[-1]), self.B.t())
        return out


def base_layer(layer: nn.Module) -> nn.Module:
    """The layer inside a PEFT layer, or the layer itself."""
    return getattr(layer, "base_layer", layer)
