"""A file's change of one layer, in the part and in the shapes that the layer of the model needs."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from lora_compose.attention.fitting import weight_shape
from lora_compose.attention.lora_bank import LoraFactors
from lora_compose.pipelines.formats.alphas import Alphas
from lora_compose.pipelines.formats.change import Change
from lora_compose.pipelines.formats.kinds import readable
from lora_compose.pipelines.formats.layers import Layer

FITTING = 0.1
"""The share of a file's layers below which it is for another model."""


def unclear(layer: Layer, target: nn.Module, alphas: Alphas) -> str:
    """Why a layer's change is one thing in training and another in a merged weight; empty if it is not."""
    kind = None if layer.refused else readable(layer.shapes)
    return "" if kind is None or kind.unclear is None else kind.unclear(target, alphas.of_peft(layer))


def notes_on(reasons: Iterable[str]) -> tuple[str, ...]:
    """Notes on layers that are left out, by the reason for each of them."""
    return tuple(f"{count} layers are left out: {why}" for why, count in Counter(reasons).items())


def fitted(made: Change, layer: Layer, target: nn.Module) -> Change:
    """A file's change with the transform and in the shapes that a layer of the model needs (`Kind.placed`)."""
    transform, place = made.factors.transform, layer.kind.placed
    if transform is not None and place is not None:
        transform = place(transform, layer, target)
    return replace(made, factors=reshaped(replace(made.factors, transform=transform), target))


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
