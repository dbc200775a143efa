"""FLOPs of tensor operations, with values or on the meta device."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class Operations(TorchDispatchMode):
    """Counts FLOPs inside a `with` block by the formulas of PyTorch's `FlopCounterMode`.

    `FlopCounterMode` misses `addmm_`, with which the bank adds its deltas, and fused attention on the CPU. And PyTorch
    computes shapes of meta tensors in Python, slowly; here this is done once for every operation and kind of input, for
    the whole process.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        leaves = tuple(_leaves((*args, *kwargs.values())))
        kind = func, tuple(kwargs), tuple(map(_kind, leaves))
        if kind in _known:
            again, flops = _known[kind]
            self.flops += flops
            return again(func, args, kwargs)
        out = func(*args, **kwargs)
        formula = _FORMULAS.get(func.overloadpacket)
        flops = 0 if formula is None else formula(*args, **kwargs, out_val=out)
        self.flops += flops
        if all(leaf.is_meta for leaf in (*leaves, *_leaves([out])) if isinstance(leaf, Tensor)):
            _known[kind] = _again(func, out), flops
        return out


_FORMULAS = {
    **flop_registry,
    torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        torch.ops.aten._scaled_dot_product_flash_attention
    ],
}
_known: dict[tuple, tuple[Callable[[Any, tuple, dict], Any], int]] = {}


def _again(func: Any, out: Any) -> Callable[[Any, tuple, dict], Any]:
    """A function that returns the result of an operation for another input of the same kind."""
    shared = [result.alias_info for result in func._schema.returns if result.alias_info]
    if not shared:
        make = _maker(out)
        return lambda func, args, kwargs: make()
    if func._schema.name.endswith("_") and torch.Tag.inplace_view not in func.tags:
        return lambda func, args, kwargs: args[0]
    return lambda func, args, kwargs: func(*args, **kwargs)


def _leaves(values: Iterable) -> Iterator:
    for value in values:
        if isinstance(value, list | tuple):
            yield len(value)
            yield from _leaves(value)
        else:
            yield value


def _kind(leaf: Any) -> tuple:
    return (leaf.shape, leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else (type(leaf), leaf)


def _maker(result: Any) -> Callable[[], Any]:
    """A function that makes more like it. It keeps no tensor, whose memory and graph would count."""
    if isinstance(result, Tensor):
        size, stride = tuple(result.shape), result.stride()
        return partial(torch.empty_strided, size, stride, dtype=result.dtype, device=result.device)
    if isinstance(result, list | tuple):
        kind, makers = type(result), tuple(map(_maker, result))
        return lambda: kind(make() for make in makers)
    return lambda: result
