"""Small helpers around models and devices."""

import torch
from torch import Tensor, nn


def to_device(tensor: Tensor, device: torch.device | None) -> Tensor:
    """Copies a tensor to a device without making the host wait (`non_blocking`), except on MPS.

    CUDA stages pageable memory before the call returns, so the source may be changed afterwards. MPS does not.
    """
    return tensor.to(device, non_blocking=device is not None and device.type != "mps")


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """All modules of a model by name, in the order of `named_modules`, which takes five times as long."""
    found: dict[str, nn.Module] = {}
    seen: set[nn.Module] = set()
    ahead: list[tuple[str, nn.Module]] = [("", uncompiled(model))]
    while ahead:
        name, module = ahead.pop()
        if module in seen:
            continue
        seen.add(module)
        found[name] = module
        start = f"{name}." if name else ""
        for child, inner in reversed(module._modules.items()):
            if inner is not None:
                ahead.append((start + child, inner))
    return found


def uncompiled(model: nn.Module) -> nn.Module:
    """The model inside the wrapper that `torch.compile(model)` returns, or the model itself."""
    return getattr(model, "_orig_mod", model)
