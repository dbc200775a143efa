"""Whether bf16 is of use on this machine: on some CPUs it is slower than fp32, on others faster."""

import time
from functools import cache

import torch

SIDE = 768
TRIES = 5


@cache
def cpu_has_bf16() -> bool:
    """Whether the CPU computes in bf16 faster than in fp32; tried out on matrices, which takes a tenth of a second.

    Instructions for bf16 say too little: of processors that have them, one multiplies at half of fp32's speed, another
    at more than twice of it.
    """
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is not None and bool(supported()) and _seconds(torch.bfloat16) < _seconds(torch.float32)


def _seconds(dtype: torch.dtype) -> float:
    """The shortest of several times that a product of two matrices takes."""
    matrix, times = torch.ones(SIDE, SIDE, dtype=dtype), []
    for _ in range(TRIES):
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        times.append(time.perf_counter() - start)
    return min(times)


def cpu_autocast() -> torch.autocast:
    """Autocasting to bf16 on the CPU, where that makes it faster."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=cpu_has_bf16())
