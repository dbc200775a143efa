"""Layers with the attributes and shapes of those that diffusers makes for Nunchaku, whose kernels need a GPU.

Read in diffusers 0.42.1, `quantizers/nunchaku/utils.py`: `SVDQW4A4Linear` and `AWQW4A16Linear` replace linear layers
under their names, extend `nn.Module`, and have no `weight`. In which order their kernels pack numbers is not told
there; here it is the plain one.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RANK = 4
GROUP = 64


def _fixed(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.contiguous(), requires_grad=False)


def _scaled(values: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Whole numbers from -7 to 7, and the size of one, for each group of the last dimension."""
    grouped = values.unflatten(-1, (-1, group))
    size = grouped.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / 7
    return (grouped / size).round().flatten(-2), size.squeeze(-1)


def fits(layer: nn.Linear) -> bool:
    """Whether its numbers can be packed: two inputs, and of AWQ four outputs, in one."""
    return layer.in_features % 2 == 0 and layer.out_features % 4 == 0


class _Packed(nn.Module):
    """Groups of the inputs of a linear layer, with fewer numbers where it has few."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.group_size = math.gcd(GROUP, layer.in_features)
        self.bias = layer.bias

    def sizes(self, packed: Tensor) -> Tensor:
        """By weight, from those by group. Shapes: [groups, outputs] and [outputs, inputs]."""
        return packed.T.repeat_interleave(self.group_size, dim=1)


class SVDQuant(_Packed):
    """Four bits for weights and inputs, beside a low-rank part of the weight in the model's precision.

    qweight: two numbers in one of int8. Shape: [outputs, inputs / 2].
    wscales: Shape: [inputs / group_size, outputs].
    smooth_factor: Inputs are divided by it before they are rounded. Shape: [inputs].
    proj_down, proj_up: Shapes: [inputs, rank] and [outputs, rank].
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        left, values, right = torch.linalg.svd(layer.weight, full_matrices=False)
        self.smooth_factor = _fixed(torch.linspace(0.5, 2, layer.in_features))
        self.proj_up, self.proj_down = _fixed(left[:, :RANK] * values[:RANK]), _fixed(right[:RANK].T)
        rest = (layer.weight - self.proj_up @ self.proj_down.T) * self.smooth_factor
        codes, sizes = _scaled(rest, self.group_size)
        pairs = codes.to(torch.int16) & 15
        self.qweight = _fixed((pairs[:, ::2] | pairs[:, 1::2] << 4).to(torch.uint8).view(torch.int8))
        self.wscales = _fixed(sizes.T)

    def residual(self) -> Tensor:
        """What the numbers in four bits stand for. Shape: [outputs, inputs]."""
        packed = self.qweight.view(torch.uint8).to(torch.int16)
        codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)
        return torch.where(codes > 7, codes - 16, codes) * self.sizes(self.wscales)

    def dense(self) -> Tensor:
        """The weight without the rounding of inputs."""
        return self.residual() / self.smooth_factor + self.proj_up @ self.proj_down.T

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        codes, sizes = _scaled(rows / self.smooth_factor, self.group_size)
        read = codes * sizes.repeat_interleave(self.group_size, dim=1)
        out = F.linear(read, self.residual(), self.bias) + rows @ self.proj_down @ self.proj_up.T
        return out.to(x.dtype).reshape(*x.shape[:-1], self.out_features)


class AWQ(_Packed):
    """Four bits for weights.

    qweight: eight numbers, of four outputs and two inputs, in one of int32. Shape: [outputs / 4, inputs / 2].
    wscales, wzeros: The size of one, and what 0 stands for. Shapes: [inputs / group_size, outputs].
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        grouped = layer.weight.unflatten(1, (-1, self.group_size))
        least, most = grouped.amin(dim=2), grouped.amax(dim=2)
        self.wscales, self.wzeros = _fixed((most - least).T / 15), _fixed(least.T)
        codes = ((layer.weight - self.sizes(self.wzeros)) / self.sizes(self.wscales)).round().to(torch.int64)
        eights = codes.view(self.out_features // 4, 4, self.in_features // 2, 2).permute(0, 2, 1, 3).flatten(2)
        packed = (eights << self.shifts).sum(dim=-1)
        self.qweight = _fixed(torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32))

    @property
    def shifts(self) -> Tensor:
        """Bits before each of eight numbers."""
        return torch.arange(0, 32, 4)

    def dense(self) -> Tensor:
        """The weight. Shape: [outputs, inputs]."""
        eights = (self.qweight[..., None].to(torch.int64) >> self.shifts) & 15
        codes = eights.unflatten(2, (4, 2)).permute(0, 2, 1, 3).reshape(self.out_features, self.in_features)
        return codes * self.sizes(self.wscales) + self.sizes(self.wzeros)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense().to(x.dtype), self.bias)
