"""Attention maps of chosen cross-attention layers, as they are computed."""

from collections.abc import Iterable

import torch
from torch import Tensor


class Recorder:
    """Takes the attention that image cells pay to groups of tokens during one pass.

    Maps are assigned by layer, never added up, so that a recomputation under gradient checkpointing changes nothing.

    Args:
        layers: Names of the cross-attention layers wanted.
        readout: Weight of every token in every map. Shape: [rows, tokens, maps].

    Attributes:
        maps: Mean over heads, by layer, in fp32. Shape: [rows, cells, maps] each.
    """

    def __init__(self, layers: Iterable[str], readout: Tensor) -> None:
        self.layers = frozenset(layers)
        self.readout = readout.float()
        self.maps: dict[str, Tensor] = {}

    def take(self, layer: str, query: Tensor, key: Tensor, scale: float) -> None:
        """Records a layer.

        Args:
            layer: Its name.
            query: Shape: [rows, heads, cells, channels].
            key: Shape: [rows, heads, tokens, channels].
            scale: Factor on the logits.
        """
        logits = query.float() @ key.float().transpose(-1, -2) * scale
        self.maps[layer] = torch.softmax(logits, dim=-1).mean(dim=1) @ self.readout

    def mean(self) -> Tensor:
        """Mean over the recorded layers, which must share one grid. Shape: [rows, cells, maps]."""
        return torch.stack([self.maps[layer] for layer in sorted(self.maps)]).mean(dim=0)
