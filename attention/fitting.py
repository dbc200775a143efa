"""Whether the factors of a LoRA fit the layers of a model."""

import math
from collections.abc import Mapping

from torch import nn

from lora_compose.attention.device import is_linear
from lora_compose.attention.lora_bank import LoraFactors, base_layer
from lora_compose.attention.sites import Site
from lora_compose.attention.transforms import Rotation


def weight_shape(model: nn.Module, name: str) -> tuple[int, ...]:
    """The shape of the weight that a LoRA would change: outputs, inputs, and the kernel of a convolution.

    From the layer's settings, since quantised and offloaded weights have other shapes. Raises ValueError if there is no
    such layer, or a LoRA cannot change it.
    """
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        layer = None
    return shape_at(name, layer, None)


def shape_at(name: str, layer: nn.Module | None, where: Mapping[str, Site] | None) -> tuple[int, ...]:
    """The shape of the weight of a module, None if the model has none of this name; the errors of `weight_shape`."""
    if layer is None or (where is not None and name not in where):
        raise ValueError(f"the model has no layer {name!r}")
    return shape_of(name, base_layer(layer))


def shape_of(name: str, layer: nn.Module) -> tuple[int, ...]:
    """The shape of a layer's weight, from its settings; the errors of `weight_shape`."""
    if is_linear(layer):
        return layer.out_features, layer.in_features  # pyright: ignore[reportReturnType]
    if not isinstance(layer, nn.Conv2d):
        raise ValueError(f"{name} is a {type(layer).__name__}; a LoRA can change linear layers and convolutions")
    if layer.groups != 1:
        raise ValueError(f"{name} is a grouped convolution, which is not supported")
    return layer.out_channels, layer.in_channels, *layer.kernel_size


def check_factors(model: nn.Module, name: str, factors: LoraFactors) -> None:
    """Checks that factors fit a layer.

    Raises:
        ValueError: Naming the layer and both shapes.
    """
    check_sides(name, factors, *weight_shape(model, name))


def check_sides(name: str, factors: LoraFactors, outputs: int, *inputs: int) -> None:
    """Checks that factors fit a weight of this shape; the errors of `check_factors`."""
    own, read = factors.transform, inputs[0]
    if isinstance(own, Rotation):
        read = math.prod(inputs)
    if own is not None and own.size != (read if own.by_input else outputs):
        side = f"{read} inputs" if own.by_input else f"{outputs} outputs"
        raise ValueError(f"{name}: the transform of the weight is of size {own.size}, the model's layer has {side}")
    down, up, left = factors.down.shape, factors.up.shape, factors.left
    if left is not None:
        shapes = down, up, left.shape
        if any(len(shape) != 2 or 0 in shape for shape in shapes) or down[0] != up[1]:
            raise ValueError(f"{name}: the factors of a Kronecker product have shapes {', '.join(map(str, shapes))}")
        if [left.shape[0] * up[0], left.shape[1] * down[1]] != [outputs, *inputs]:
            product = left.shape[0] * up[0], left.shape[1] * down[1]
            raise ValueError(
                f"{name}: the Kronecker product is {product[0]} x {product[1]}, the weight {outputs} x {inputs}"
            )
        return
    ones = (1,) * (len(inputs) - 1)
    if down[1:] != (*inputs,) or up != (outputs, *down[:1], *ones) or (0 in down and factors.transform is None):
        wanted = f"{_shape('rank', *inputs)} and {_shape(outputs, 'rank', *ones)}"
        raise ValueError(f"{name}: the factors have shapes {list(down)} and {list(up)}, the model needs {wanted}")


def _shape(*sides: object) -> str:
    return f"[{', '.join(map(str, sides))}]"
