"""DoRA's norms of the columns of W + D, where one layer of the file is several of the model (`qkv`)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lora_compose.attention.lora_bank import Lora, base_layer
from lora_compose.attention.transforms import Rescaling, dense_weight


def with_column_norms(lora: Lora, modules: Mapping[str, nn.Module], device: torch.device, dtype: torch.dtype) -> Lora:
    """Fills in `Rescaling.current`; returns the same LoRA if no layer needs it.

    By the modules of a model, unchanged yet, on a device, for inputs of this precision. Raises ValueError if the weight
    of one of these layers is not to be had.
    """
    norms: dict[Sequence[str], Tensor] = {}
    known = dict(lora)
    for name, factors in lora.items():
        transform = factors.transform
        if isinstance(transform, Rescaling) and transform.fused and transform.current is None:
            if transform.fused not in norms:
                norms[transform.fused] = _norms(transform.fused, lora, modules, device, dtype)
            known[name] = replace(factors, transform=replace(transform, current=norms[transform.fused]))
    return known if norms else lora


def _norms(
    names: Sequence[str], lora: Lora, modules: Mapping[str, nn.Module], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """The norms of the columns of several changed weights, one below the other. Shape: [inputs]."""
    squares = []
    for name in names:
        changed = dense_weight(base_layer(modules[name]), device, dtype)
        if name in lora:  # otherwise its block has a factor of 0
            changed = changed + lora[name].delta_on(device)
        squares.append(changed.square().sum(dim=0))
    return torch.stack(squares).sum(dim=0).sqrt()
