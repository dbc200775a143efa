"""Attention maps of chosen attention layers, as they are computed."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor


class Recorder:
    """Takes, during one pass, the attention that image cells pay to groups of tokens, and to each other.

    In a pass the first map of a layer stays: gradient checkpointing enters layers again during backward, and the graph
    of what it recomputes there must not outlive its block. It is computed all the same, since autograd wants to see the
    same tensors again.

    Args:
        layers: Names of the cross-attention layers wanted.
        readout: Weight of every token in every map. Shape: [rows, tokens, maps], or [texts, rows, tokens, maps] where
            cells choose among several texts; then there is a map for every text, over all cells. Fewer texts than
            there are mean the last ones.
        self_layers: Names of the self-attention layers wanted.

    Attributes:
        maps: Mean over heads, by cross-attention layer, in fp32. Shape: [(texts,) rows, cells, maps] each.
        self_maps: Mean over heads, by self-attention layer, in fp32. Shape: [rows, cells, cells seen] each.
    """

    def __init__(self, layers: Iterable[str], readout: Tensor, self_layers: Iterable[str] = ()) -> None:
        self.layers = frozenset(layers)
        self.readout = readout.float()
        self.self_layers = frozenset(self_layers)
        self.maps: dict[str, Tensor] = {}
        self.self_maps: dict[str, Tensor] = {}

    def take(
        self,
        layer: str,
        query: Tensor,
        key: Tensor,
        scale: float,
        allowed: Tensor | None = None,
        tokens: int | None = None,
    ) -> None:
        """Records a layer if it is wanted.

        Args:
            layer: Its name.
            query: Shape: [rows, heads, cells, channels].
            key: Shape: [(texts,) rows, heads, tokens or cells, channels].
            scale: Factor on the logits.
            allowed: Which cells see which cells, or which tokens; None is all. Shape: [cells, cells], or broadcast
                against [rows, heads, cells, tokens].
            tokens: How many of the keys are tokens of the text, where cells follow; None is as many as the readout has.
        """
        if layer in self.layers:
            if self.readout.dim() == 4:
                key = key[-len(self.readout) :]
            readout = self.readout[..., :tokens, :]  # a batch of shorter texts has fewer
            found = _attention(query, key, scale, allowed)[..., : readout.shape[-2]]
            self.maps.setdefault(layer, found @ readout)
        elif layer in self.self_layers:
            self.self_maps.setdefault(layer, _attention(query, key, scale, allowed))

    def clear(self) -> None:
        """Forgets what the pass before has left, for a new one."""
        self.maps.clear()
        self.self_maps.clear()

    def of_rows(self, rows: slice) -> "Recorder":
        """One that takes the maps of some of the rows."""
        readout = self.readout if self.readout.shape[-3] == 1 else self.readout[..., rows, :, :]
        return Recorder(self.layers, readout, self.self_layers)

    def join(self, parts: Sequence["Recorder"]) -> None:
        """Takes over what recorders of consecutive rows have taken."""
        first = parts[0]
        self.maps = {layer: torch.cat([part.maps[layer] for part in parts], dim=-3) for layer in first.maps}
        self.self_maps = {layer: torch.cat([part.self_maps[layer] for part in parts]) for layer in first.self_maps}

    def mean(self) -> Tensor:
        """Mean over the recorded layers, which must share one grid. Shape: [(texts,) rows, cells, maps]."""
        return _mean(self.maps)

    def self_mean(self) -> Tensor:
        """Mean over the recorded self-attention layers. Shape: [rows, cells, cells seen]."""
        return _mean(self.self_maps)


def _attention(query: Tensor, key: Tensor, scale: float, allowed: Tensor | None) -> Tensor:
    logits = query.float() @ key.float().transpose(-1, -2) * scale
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    return torch.softmax(logits, dim=-1).mean(dim=-3)


def _mean(maps: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([maps[layer] for layer in sorted(maps)]).mean(dim=0)
