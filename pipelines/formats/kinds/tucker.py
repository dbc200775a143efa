"""LyCORIS' Tucker decomposition, in which LoHa and LoKr may have their factors: a core between two matrices."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_compose.pipelines.formats.kinds.kind import check_rank


def tucker_sides(core: Sequence[int], up: Sequence[int], down: Sequence[int]) -> tuple[int, ...]:
    """Outputs, inputs, height and width. Raises ValueError if the core does not fit, or the rank is too large."""
    if len(core) != 4 or core[0] != up[0] or core[1] != down[0]:
        raise ValueError(f"a core of shape {list(core)} fits no factors {list(up)} and {list(down)}")
    check_rank(max(core[:2]), up[1], down[1])
    return up[1], down[1], *core[2:]


def tucker(core: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """A Tucker core as two factors: [outputs, rank] and [rank, inputs, height, width]."""
    return up.T, torch.einsum("ijhw,jr->irhw", core, down)
