"""Whether bf16 is of use on this machine: without instructions for it a CPU is many times slower than in fp32."""

from functools import cache

import torch


@cache
def cpu_has_bf16() -> bool:
    """Whether the CPU computes in bf16 at a speed like that of fp32."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is not None and bool(supported())


def cpu_autocast() -> torch.autocast:
    """Autocasting to bf16 on the CPU, where that makes it faster."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=cpu_has_bf16())
