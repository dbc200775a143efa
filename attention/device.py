"""Small helpers around models and devices."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def to_device(tensor: Tensor, device: torch.device | None) -> Tensor:
    """Copies a tensor to a device without making the host wait (`non_blocking`), except on MPS.

    CUDA stages pageable memory before the call returns, so the source may be changed afterwards. MPS does not.
    """
    return tensor.to(device, non_blocking=device is not None and device.type != "mps")


@contextmanager
def as_outside_of_inference_mode() -> Iterator[None]:
    """Inside this block tensors are made that autograd can use later, also in a call in `torch.inference_mode`."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """All modules of a model by name, in the order of `named_modules`, which takes ten times as long."""
    model = uncompiled(model)
    modules, seen = {"": model}, {model}

    def visit(module: nn.Module, start: str) -> None:
        for child, inner in module._modules.items():
            if inner is not None and inner not in seen:
                seen.add(inner)
                modules[start + child] = inner
                if inner._modules:
                    visit(inner, f"{start}{child}.")

    visit(model, "")
    return modules


def dtype_of(model: nn.Module) -> torch.dtype:
    """The precision in which a model of diffusers runs: its `dtype`, which first asks every module for hooks."""
    original: Any = uncompiled(model)
    hooked = any("_diffusers_hook" in module.__dict__ for module in modules_of(original).values())
    if not hooked and not getattr(original, "_keep_in_fp32_modules", None):
        for parameter in original.parameters():
            if parameter.is_floating_point():
                return parameter.dtype
    return original.dtype


def uncompiled(model: nn.Module) -> nn.Module:
    """The model inside the wrapper that `torch.compile(model)` returns, or the model itself."""
    return getattr(model, "_orig_mod", model)
