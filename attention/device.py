"""Small helpers around models and devices."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

RowIndex = slice | Tensor
"""Rows of a batch: a slice where they are contiguous, which copies nothing; otherwise their indices."""


def to_device(tensor: Tensor, device: torch.device | None) -> Tensor:
    """Copies a tensor to a device without making the host wait (`non_blocking`), except on MPS.

    CUDA stages pageable memory before the call returns, so the source may be changed afterwards. MPS does not.
    """
    return tensor.to(device, non_blocking=device is not None and device.type != "mps")


def row_index(indices: Sequence[int], device: torch.device | None) -> RowIndex | None:
    """Rows of a batch on a device, in ascending order; None if there are none."""
    if not indices:
        return None
    if indices[-1] - indices[0] == len(indices) - 1:
        return slice(indices[0], indices[-1] + 1)
    return to_device(torch.tensor(indices), device)


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


def hooked(modules: Iterable[nn.Module]) -> list[Any]:
    """The modules with hooks of diffusers; an empty registry, which its pipelines leave in a model, is none."""
    return [module for module in modules if getattr(module.__dict__.get("_diffusers_hook"), "hooks", None)]


def dtype_of(model: nn.Module) -> torch.dtype:
    """The precision in which a model of diffusers runs: its `dtype`, which first asks every module for hooks."""
    original: Any = uncompiled(model)
    if hooked(modules_of(original).values()):
        return original.dtype
    apart = getattr(original, "_keep_in_fp32_modules", None) or ()
    named = original.named_parameters() if apart else (("", parameter) for parameter in original.parameters())
    for name, parameter in named:
        # No layer computes with numbers of one byte: they are of quantised weights.
        if parameter.is_floating_point() and parameter.itemsize > 1 and not any(part in name for part in apart):
            return parameter.dtype
    return original.dtype


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer is linear: PyTorch's or one that extends it, or one of a quantisation library that is neither."""
    if isinstance(layer, nn.Linear):
        return True
    if layer._modules or isinstance(layer, nn.Conv2d):
        return False
    sides = (getattr(layer, "in_features", None), getattr(layer, "out_features", None))
    return all(isinstance(side, int) for side in sides)


def is_adaptable(layer: nn.Module) -> bool:
    """Whether a LoRA can change a layer: linear layers and convolutions."""
    return is_linear(layer) or isinstance(layer, nn.Conv2d)


def has_plain_weight(layer: nn.Module, weight: Tensor) -> bool:
    """Whether the numbers of a weight are those that the layer multiplies by; in quantised layers they are not."""
    if type(weight) not in (nn.Parameter, Tensor) or not weight.is_floating_point():
        return False
    return weight.itemsize > 1 or type(layer).forward in (nn.Linear.forward, nn.Conv2d.forward)


def uncompiled(model: nn.Module) -> nn.Module:
    """The model inside the wrapper that `torch.compile(model)` returns, or the model itself."""
    return getattr(model, "_orig_mod", model)
