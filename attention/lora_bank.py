"""All concepts' LoRA factors pooled per layer: one low-rank product whatever the number of concepts.

With `A = [A_1; A_2; ...]` (sum of ranks x inputs) and `B = [s_1 B_1 | s_2 B_2 | ...]` (outputs x sum of ranks),
s = alpha / rank,

    y = base(x) + ((x A^T) * G) B^T

where G holds every concept's gate repeated over its ranks. All ones is the plain sum of LoRAs, a token mask on the keys
and values of cross-attention is TARA, an image mask is a regional LoRA, one value per row is one LoRA per branch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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

    def delta(self, device: torch.device | str | None = None) -> Tensor:
        """The dense change of the weight, in fp32 and in the weight's shape."""
        down, up = self.down.to(device, torch.float32), self.up.to(device, torch.float32)
        return (self.scale * up.flatten(1) @ down.flatten(1)).view(up.shape[0], *down.shape[1:])


Lora = Mapping[str, LoraFactors]
"""A concept's factors by name of the layer they change."""


class BankLayer(nn.Module):
    """Stands in for one adapted layer while concepts are installed, and keeps it as its child.

    A replaced module rather than a forward hook, since `torch.compile` may reuse a graph that was compiled without the
    hook, and so drop the LoRA silently. As a child, the layer is still reached by `.to()` and by offloading.

    Args:
        layer: The layer as found: linear, convolution, or a PEFT layer around one of them.
        factors: (index of the concept, its factors) of every concept that changes this layer.
        site: Stream and grid of the layer.
        concepts: How many concepts there are in all.
        state: Holds the gates of the current pass.
        device: Where the model runs.
        dtype: The precision in which it runs.
    """

    A: Tensor
    B: Tensor

    def __init__(
        self,
        layer: nn.Module,
        factors: Sequence[tuple[int, LoraFactors]],
        site: Site,
        concepts: int,
        state: ForwardState,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.factors = tuple(factors)
        base = base_layer(layer)
        self.convolution = isinstance(base, nn.Conv2d)
        ranks = [0] * concepts
        for index, factor in factors:
            ranks[index] += factor.rank
        self.key = GateKey(site, self.convolution, tuple(ranks))
        self._state = state
        down = torch.cat([factor.down.to(device, dtype) for _, factor in factors])
        up = [(factor.up.to(device, torch.float32) * factor.scale).to(dtype) for _, factor in factors]
        self.register_buffer("A", down, persistent=False)
        self.register_buffer("B", torch.cat(up, dim=1), persistent=False)

    def with_factors(
        self, factors: Sequence[tuple[int, LoraFactors]], *, device: torch.device, dtype: torch.dtype
    ) -> "BankLayer":
        """A copy of this layer with other factors."""
        concepts = len(self.key.ranks)
        made = BankLayer(self.layer, factors, self.key.site, concepts, self._state, device=device, dtype=dtype)
        made.training = self.training
        return made

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
        if self.convolution:
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
