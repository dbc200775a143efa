"""Attention kernels. Our processor computes attention with the kernel of the processor that it replaces."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Kernel(Protocol):
    """Computes attention for [rows, heads, positions, channels] tensors and returns the same shape."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        """The output of attention.

        Args:
            query: Shape: [rows, heads, positions, channels].
            key: Shape: [rows, heads, keys, channels].
            value: Shape: as `key`.
            bias: Added to the scores of all heads. Shape: [rows, 1, positions, keys]; 1 position is for all.
        """
        ...


def sdpa(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    """PyTorch's scaled dot product attention, as in diffusers' AttnProcessor2_0; with a scale of its own, if given."""
    bias = None if bias is None else bias.to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, bias, scale=scale)


@dataclass(frozen=True)
class PlainKernel:
    """Scores, softmax and product one after the other, as in diffusers' AttnProcessor."""

    scale: float
    upcast_attention: bool
    upcast_softmax: bool

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        """The output of attention."""
        if self.upcast_attention:
            query, key = query.float(), key.float()
        start, beta = query.new_empty(1, 1, 1), 0
        if bias is not None:
            start, beta = bias.to(query.dtype).expand(-1, query.shape[1], -1, -1).flatten(0, 1), 1
        # As diffusers does it: the scale comes before the scores are rounded to half precision.
        scores = torch.baddbmm(
            start, query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2), beta=beta, alpha=self.scale
        )
        probabilities = torch.softmax(scores.float() if self.upcast_softmax else scores, dim=-1)
        return probabilities.to(value.dtype).unflatten(0, value.shape[:2]) @ value


@dataclass(frozen=True)
class SlicedKernel:
    """A few heads after the other, to save memory, as in diffusers' SlicedAttnProcessor."""

    kernel: Kernel
    heads: int

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        """The output of attention."""
        parts = zip(*(x.split(self.heads, dim=1) for x in (query, key, value)), strict=True)
        return torch.cat([self.kernel(queries, keys, values, bias) for queries, keys, values in parts], dim=1)


@dataclass(frozen=True)
class XFormersKernel:
    """Memory-efficient attention from xformers, with the operator that the user chose."""

    scale: float
    operator: Callable | None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        """The output of attention."""
        import xformers.ops  # pyright: ignore[reportMissingImports]

        if bias is not None:  # its rows have to start at multiples of 8 in memory
            keys = bias.shape[-1]
            bias = F.pad(bias.to(query.dtype), (0, -keys % 8))[..., :keys]
            bias = bias.expand(-1, query.shape[1], query.shape[2], -1)
        query, key, value = (x.transpose(1, 2).contiguous() for x in (query, key, value))
        out = xformers.ops.memory_efficient_attention(
            query, key, value, attn_bias=bias, op=self.operator, scale=self.scale
        )
        return out.transpose(1, 2)
