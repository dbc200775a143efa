"""Two ways to put bank layers and region norms into a model: in place of its modules, or on their `forward`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

from torch import nn

from lora_compose.attention.claims import Journal
from lora_compose.attention.lora_bank import BankLayer
from lora_compose.attention.region_norm import RegionNorm
from lora_compose.attention.swapped_forward import SwappedForward

How = Literal["module", "forward"]
"""In place of a module, or on its `forward`; the numbers are the same. On `forward`, modules and keys of the state dict
stay, for programs that patch weights themselves. Then hooks of a module get its output with the LoRAs, factors stay
where they are when the model moves, `torch.compile` makes new graphs for each installation, and `Installation.fold` is
refused."""

Placed = BankLayer | RegionNorm
Around = Callable[[Any], Callable[..., Any]]
"""Makes of a layer what is called in its stead, on the `forward` of a module."""


def check_how(how: How) -> None:
    """Raises ValueError for another word."""
    if how not in get_args(How):
        raise ValueError(f"how is {how!r}; expected {' or '.join(map(repr, get_args(How)))}")


def put_in(
    modules: Mapping[str, nn.Module],
    layers: Mapping[str, Placed],
    undo: Journal,
    how: How,
    around: Around | None = None,
) -> None:
    """Lets layers act on the modules of the same names; `around` is called instead of a layer on `forward`."""
    if how == "forward":
        calls = {name: layer if around is None else around(layer) for name, layer in layers.items()}
        swaps = [(SwappedForward(modules[name], calls[name]), layer, modules[name]) for name, layer in layers.items()]
        undo.callback(_take_off, swaps)
        for swap, layer, module in swaps:
            layer.act_on(module, swap.original)
            swap.put_on()
        return
    undo.callback(_take_out, modules, layers)
    for name, layer in layers.items():
        layer.act_on(modules[name])
        replace_module(modules, name, layer)


def _take_off(swaps: Sequence[tuple[SwappedForward, Placed, nn.Module]]) -> None:
    """Puts each `forward` found back, also if only some have been swapped."""
    for swap, layer, _ in swaps:
        swap.take_off()
        layer.let_go()


def _take_out(modules: Mapping[str, nn.Module], layers: Mapping[str, Placed]) -> None:
    """Puts the layers found back, also if only some have been replaced."""
    for name, layer in layers.items():
        replace_module(modules, name, modules[name])
        layer.let_go()


def replace_module(modules: Mapping[str, nn.Module], name: str, layer: nn.Module) -> None:
    """Puts a layer in the place of that name."""
    parent, _, child = name.rpartition(".")
    modules[parent]._modules[child] = layer
