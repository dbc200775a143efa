"""How latents are compared: `from comparisons import assert_close, far_apart`."""

import torch
from torch import Tensor


def assert_close(one: Tensor, other: Tensor, tolerance: float = 1e-4) -> None:
    """The same numbers, up to a deviation and a part of each."""
    torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


def far_apart(one: Tensor, other: Tensor) -> bool:
    """Whether two images differ by more than rounding."""
    return bool((one - other).abs().max() > 1e-2)
