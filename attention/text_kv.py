"""Keys and values of cross-attention: they depend on the text alone, so one image needs them once."""

from collections.abc import Callable

import torch
from torch import Tensor


class TextKV:
    """Keeps keys and values by layer for one text and one set of gates.

    `Installation.use` starts a new one as soon as the text embeddings or their gates are other tensors, which covers
    new prompts, weights, rows, dtypes and devices.
    """

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}

    def get(self, layer: str, project: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Key and value of a layer, projected on first use. Shape: [rows, tokens, inner channels] each.

        Made without a graph: neither text nor weights are ever optimised.
        """
        if layer not in self._kept:
            with torch.no_grad():
                self._kept[layer] = project()
        return self._kept[layer]
