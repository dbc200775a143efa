"""Small helpers around models and devices."""

import torch
from torch import Tensor, nn


def to_device(tensor: Tensor, device: torch.device | None) -> Tensor:
    """Copies a tensor to a device without making the host wait (`non_blocking`), except on MPS.

    CUDA stages pageable memory before the call returns, so the source may be changed afterwards. MPS does not.
    """
    return tensor.to(device, non_blocking=device is not None and device.type != "mps")


def uncompiled(model: nn.Module) -> nn.Module:
    """The model inside the wrapper that `torch.compile(model)` returns, or the model itself."""
    return getattr(model, "_orig_mod", model)
