"""A file's change of one layer, in the part and in the shapes that the layer of the model needs."""

import math
from dataclasses import replace

import torch
from torch import nn

from lora_compose.attention.fitting import weight_shape
from lora_compose.attention.lora_bank import LoraFactors
from lora_compose.attention.transforms import Rescaling, Rotation, Transform
from lora_compose.pipelines.formats.alphas import Alphas
from lora_compose.pipelines.formats.change import Change
from lora_compose.pipelines.formats.kinds import OFT_INPUTS, readable
from lora_compose.pipelines.formats.layers import Layer

FITTING = 0.1
"""The share of a file's layers below which it is for another model."""
SUMS_PATCHES = (
    "PEFT's OFT of convolutions larger than 1 x 1 is not defined: as it is trained, overlapping patches are added up, "
    "also where nothing is rotated; as it is merged, the weight is rotated"
)


def sums_patches(layer: Layer, target: nn.Module, alphas: Alphas) -> bool:
    """Whether a layer's change is one thing in training and another in a merged weight (`SUMS_PATCHES`)."""
    of_peft = not layer.refused and readable(layer.shapes) is OFT_INPUTS and alphas.of_peft(layer)
    return of_peft and isinstance(target, nn.Conv2d) and math.prod(target.kernel_size) > 1


def placed(transform: Transform, layer: Layer, target: nn.Module) -> Transform:
    """The part of a transform that belongs to a layer of the model. Raises ValueError if it has none of its own."""
    if transform.by_input:
        return replace(transform, fused=layer.fused) if isinstance(transform, Rescaling) else _turned(transform, target)
    values = transform.values
    size = transform.size // len(values)
    if layer.outputs is not None:
        if layer.outputs.start % size or layer.outputs.stop % size:
            raise ValueError(f"its blocks of size {size} reach over the layers of the model that it changes")
        values = values[layer.outputs.start // size : layer.outputs.stop // size]
    if layer.swapped:
        if len(values) % 2:
            raise ValueError(
                f"one of its {len(values)} blocks reaches over halves that the model has the other way round"
            )
        values = torch.cat(values.chunk(2)[::-1])
    return Rescaling(values) if isinstance(transform, Rescaling) else Rotation(values)


def fitted(made: Change, layer: Layer, target: nn.Module) -> Change:
    """A file's change with the transform and in the shapes that a layer of the model needs; the errors of `placed`."""
    transform = made.factors.transform
    factors = replace(made.factors, transform=None if transform is None else placed(transform, layer, target))
    return replace(made, factors=reshaped(factors, target))


def _turned(rotation: Rotation, target: nn.Module) -> Rotation:
    """A rotation of the inputs of a layer, with as many blocks and in the direction that it has there."""
    values = rotation.values
    if rotation.shared:
        count, rest = divmod(math.prod(weight_shape(target, "")[1:]), values.shape[-1])
        if rest:
            raise ValueError(f"its blocks of size {values.shape[-1]} do not divide the layer's inputs")
        values = values.expand(count, -1, -1)
    return replace(rotation, values=values.mT if rotation.turned_back and isinstance(target, nn.Conv2d) else values)


def rows_of(factors: LoraFactors, outputs: slice) -> LoraFactors | None:
    """Some outputs of a Kronecker product; None if they are no whole rows of its left matrix."""
    assert factors.left is not None
    inner = len(factors.up)
    if outputs.start % inner or outputs.stop % inner:
        return None
    return replace(factors, left=factors.left[outputs.start // inner : outputs.stop // inner])


def reshaped(factors: LoraFactors, layer: nn.Module) -> LoraFactors:
    """Matrices for a convolution, and 1x1 convolutions for a linear layer, are the same numbers."""
    down, up = factors.down, factors.up
    if not down.numel() and factors.transform is not None:  # nothing but the transform
        outputs, *inputs = weight_shape(layer, "")
        return replace(factors, down=down.new_empty(0, *inputs), up=up.new_empty(outputs, 0, *[1] * (len(inputs) - 1)))
    if isinstance(layer, nn.Conv2d):
        inputs = (layer.in_channels, *layer.kernel_size)
        if down.ndim == 2 and down.shape[1] == math.prod(inputs):
            down = down.reshape(-1, *inputs)
        up = up[:, :, None, None] if up.ndim == 2 else up
    elif down.shape[2:] == up.shape[2:] == (1, 1):
        down, up = down.flatten(1), up.flatten(1)
    return replace(factors, down=down, up=up)
