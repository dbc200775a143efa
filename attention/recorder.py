"""Attention maps of chosen attention layers, as they are computed."""

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

_AT_ONCE = 2**26
"""Bytes of scores that are computed together. Where text and image are in one sequence, all heads need gigabytes."""


class Recorder:
    """Records the attention that image cells pay to groups of tokens, and to each other, during one pass.

    Only the first map of a layer counts. Gradient checkpointing runs layers again during backward, and the graph of a
    recomputed map must not outlive its block; the map is still computed, since checkpointing expects the same saved
    tensors.

    Args:
        layers: Names of the cross-attention layers to record.
        token_weights: Weight of every token in every map. Shape: [rows, tokens, maps], or [texts, rows, tokens, maps]
            in a pass with several texts; then there is a map for every text, over all cells. If it has fewer texts than
            the pass, they are the last ones.
        self_layers: Names of the self-attention layers to record.
        output_layer: Name of a self-attention layer whose output is recorded.

    Attributes:
        maps: Mean over heads, by cross-attention layer, in fp32. Shape: [(texts,) rows, cells, maps] each.
        self_maps: Mean over heads, by self-attention layer, in fp32. Shape: [rows, cells, cells seen] each.
        output: What `output_layer` gives its output projection on transformers with one sequence, and what that gives
            on others, in fp32. Shape: [rows, cells, channels].
    """

    def __init__(
        self,
        layers: Iterable[str],
        token_weights: Tensor,
        self_layers: Iterable[str] = (),
        output_layer: str | None = None,
    ) -> None:
        self.layers = frozenset(layers)
        self.token_weights = token_weights.float()
        self.self_layers = frozenset(self_layers)
        self.output_layer = output_layer
        self.maps: dict[str, Tensor] = {}
        self.self_maps: dict[str, Tensor] = {}
        self.output: Tensor | None = None

    @property
    def all_layers(self) -> frozenset[str]:
        """Every layer of which something is recorded."""
        return self.layers | self.self_layers | ({self.output_layer} if self.output_layer else frozenset())

    def take(
        self,
        layer: str,
        query: Tensor,
        key: Tensor,
        scale: float,
        allowed: Tensor | None = None,
        tokens: int | None = None,
        bias: Tensor | None = None,
        *,
        several_texts: bool = False,
    ) -> None:
        """Records a layer if it was asked for.

        Args:
            query: Shape: [rows, heads, cells, channels].
            key: Shape: [(texts,) rows, heads, tokens or cells, channels].
            scale: Factor on the logits.
            allowed: True where a cell sees a cell or token; None means everywhere. Shape: [cells, cells], or broadcast
                against [rows, heads, cells, tokens].
            tokens: How many leading keys are text tokens, if cells follow; None means as many as `token_weights` has.
            bias: Added to the logits. Shape: broadcast against [rows, heads, cells, tokens].
            several_texts: Whether `key` has the dimension of texts, as the weights of tokens do then.
        """
        if layer in self.layers:
            if several_texts:
                key = key[-len(self.token_weights) :]
            token_weights = self.token_weights[..., :tokens, :]  # a micro-batch of shorter texts has fewer tokens
            probabilities = _attention(query, key, scale, allowed, bias)[..., : token_weights.shape[-2]]
            self.maps.setdefault(layer, probabilities @ token_weights)
        elif layer in self.self_layers:
            self.self_maps.setdefault(layer, _attention(query, key, scale, allowed, bias))

    def take_output(self, layer: str, output: Tensor) -> None:
        """Records the output of a layer if it was asked for. Shape: [rows, cells, channels]."""
        if layer == self.output_layer and self.output is None:
            self.output = output.float()

    def clear(self) -> None:
        """Discards the maps of the previous pass."""
        self.maps.clear()
        self.self_maps.clear()
        self.output = None

    def of_rows(self, rows: slice) -> "Recorder":
        """A recorder for a slice of the rows."""
        token_weights = self.token_weights if self.token_weights.shape[-3] == 1 else self.token_weights[..., rows, :, :]
        return Recorder(self.layers, token_weights, self.self_layers, self.output_layer)

    def join(self, parts: Sequence["Recorder"], rows: Sequence[int]) -> None:
        """Joins the maps of recorders of consecutive rows into this one.

        Args:
            rows: How many rows each part has. Those of a part without maps, which went through a network without text,
                attend to no token.
        """
        self.maps = _joined([part.maps for part in parts], rows)
        self.self_maps = _joined([part.self_maps for part in parts], rows)
        outputs = [{} if part.output is None else {"": part.output} for part in parts]
        self.output = _joined(outputs, rows).get("")

    def mean(self) -> Tensor:
        """Mean over the recorded layers, which must share one grid. Shape: [(texts,) rows, cells, maps]."""
        return _mean(self.maps)

    def self_mean(self) -> Tensor:
        """Mean over the recorded self-attention layers. Shape: [rows, cells, cells seen]."""
        return _mean(self.self_maps)


def _joined(parts: Sequence[Mapping[str, Tensor]], rows: Sequence[int]) -> dict[str, Tensor]:
    """Maps by layer of consecutive rows. Shape: [..., rows, cells, maps]."""
    known = next(filter(None, parts), {})

    def of(part: Mapping[str, Tensor], layer: str, count: int) -> Tensor:
        like = known[layer]
        return part[layer] if part else like.new_zeros(*like.shape[:-3], count, *like.shape[-2:])

    each = list(zip(parts, rows, strict=True))
    return {layer: torch.cat([of(part, layer, count) for part, count in each], dim=-3) for layer in known}


def _attention(query: Tensor, key: Tensor, scale: float, allowed: Tensor | None, bias: Tensor | None) -> Tensor:
    """Mean over heads, of which some at a time are computed. Shape: [(texts,) rows, cells, tokens or cells]."""
    heads, of_head = query.shape[-3], key[..., 0, :, 0].numel() * query.shape[-2] * torch.float32.itemsize
    at_once = max(1, _AT_ONCE // max(1, of_head))
    if at_once >= heads:
        return _probabilities(query, key, scale, allowed, bias).mean(dim=-3)

    def summed(first: int) -> Tensor:
        queries, keys, seen, added = (_heads(x, slice(first, first + at_once)) for x in (query, key, allowed, bias))
        return _probabilities(queries, keys, scale, seen, added).sum(dim=-3)

    return reduce(torch.add, map(summed, range(0, heads, at_once))) / heads


def _heads(x: Any, heads: slice) -> Any:
    """Some heads of queries or keys, or of a mask, if it has not the same for all. Shape: [..., heads, cells, any]."""
    return x if x is None or x.dim() < 3 or x.shape[-3] == 1 else x[..., heads, :, :]


def _probabilities(query: Tensor, key: Tensor, scale: float, allowed: Tensor | None, bias: Tensor | None) -> Tensor:
    logits = query.float() @ key.float().transpose(-1, -2) * scale
    if bias is not None:
        logits = logits + bias.float()
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    return torch.softmax(logits, dim=-1)


def _mean(maps: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([maps[layer] for layer in sorted(maps)]).mean(dim=0)
