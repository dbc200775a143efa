"""Cache of cross-attention keys and values: they depend on the text alone, so a call computes them once."""

from collections.abc import Callable

import torch
from torch import Tensor


class TextKV:
    """Keys and values by layer (`kept`), for one text under one set of text gates."""

    def __init__(self) -> None:
        self.kept: dict[str, tuple[Tensor, Tensor]] = {}

    def get(self, layer: str, project: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Key and value of a layer, projected on first use, without gradients. Shape: [rows, tokens, channels] each."""
        if layer not in self.kept:
            with torch.no_grad():
                self.kept[layer] = project()
        return self.kept[layer]
