"""A UNet that stops after the last layer whose attention is wanted: about half the work where only maps count."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import set_checkpoint_early_stop

from lora_compose.attention.layers import blocks, uncompiled


@contextmanager
def stopped_after(unet: nn.Module, layers: Iterable[str]) -> Iterator[None]:
    """Inside this block the UNet ends with the up block that holds the last of some layers; its output has no meaning.

    The model is cut rather than left by an exception, which would make `torch.compile` and offloading hooks stumble.
    What is cut off stays a part of it: an offloaded model may be brought to its device just then, and is not brought
    there again while its first parameter is there.

    Args:
        unet: The model.
        layers: Names of layers; without one in an up block the whole up path is left out.
    """
    model: Any = uncompiled(unet)
    layers = tuple(layers)
    names = [name for name, _, stage, _ in blocks(model) if stage == "up"]
    needed = [i for i, name in enumerate(names, start=1) if any(layer.startswith(f"{name}.") for layer in layers)]
    keep = max(needed, default=0)
    found = {name: model._modules.get(name) for name in ("up_blocks", "conv_norm_out", "conv_out")}
    up_blocks = list(model.up_blocks)
    last = up_blocks[keep - 1] if keep else None
    upsamplers = None if last is None else getattr(last, "upsamplers", None)
    cut_off = [*up_blocks[keep:], upsamplers, found["conv_norm_out"], found["conv_out"]]
    try:
        model._modules.update(up_blocks=nn.ModuleList(up_blocks[:keep]), conv_norm_out=None, conv_out=nn.Identity())
        model._modules["cut_off"] = nn.ModuleList(part for part in cut_off if part is not None)
        if upsamplers is not None:
            last.upsamplers = None  # pyright: ignore[reportOptionalMemberAccess]
        yield
    finally:
        if upsamplers is not None:
            last.upsamplers = upsamplers  # pyright: ignore[reportOptionalMemberAccess]
        model._modules.pop("cut_off", None)
        model._modules.update(found)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside this block no parameter asks for a gradient, so a graph holds on to no inputs of weights."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


@contextmanager
def weights_kept(model: nn.Module) -> Iterator[None]:
    """Inside this block a graph keeps the weights that its backward needs, whatever hooks do after each layer.

    diffusers' layerwise casting and group offloading put other numbers into a parameter once its layer has run, those
    of the storage precision or of the CPU, and the graph of that layer would find these.
    """
    hooked: list[Any] = [module for module in model.modules() if hasattr(module, "_diffusers_hook")]
    with ExitStack() as undo:
        if hooked:
            # Checkpointing would end a recomputed block by an exception, and leave out the hook after its last layer.
            undo.enter_context(set_checkpoint_early_stop(False))
        for module in hooked:  # the hooks have made `forward` an attribute of each
            undo.callback(setattr, module, "forward", module.forward)
            module.forward = _with_aliases(module.forward)
        yield


def _with_aliases(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def forward_with_aliases(*args: Any, **kwargs: Any) -> Any:
        with _Aliases():
            return forward(*args, **kwargs)

    return forward_with_aliases


class _Aliases(TorchFunctionMode):
    """Operations are given aliases of parameters, which keep their numbers when the parameter gets others."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func.__name__ != "__set__":
            args = tuple(map(_alias, args))
            kwargs = {name: _alias(given) for name, given in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))


def _alias(given: Any) -> Any:
    return given.detach() if isinstance(given, nn.Parameter) else given
