"""The weights that the graph of a forward pass with gradients may hold."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from itertools import chain
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import set_checkpoint_early_stop

from lora_compose.attention.claims import undoing
from lora_compose.attention.device import hooked, modules_of


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside this block no parameter requires a gradient, so the graph stores no inputs for weight gradients."""
    owned = chain.from_iterable(module._parameters.values() for module in modules_of(model).values())
    asking = [parameter for parameter in owned if parameter is not None and parameter.requires_grad]

    def ask(wanted: bool) -> None:
        for parameter in asking:
            parameter.requires_grad_(wanted)

    with undoing(model) as undo:
        undo.callback(ask, True)
        ask(False)
        yield


@contextmanager
def weights_kept(model: nn.Module) -> Iterator[None]:
    """Inside this block the graph keeps the weights that its backward needs, even if hooks replace them.

    diffusers' layerwise casting and group offloading replace a parameter's data once its layer has run: by the storage
    precision, or by the copy on the CPU. Backward would then use the replaced data.
    """
    holders = hooked(modules_of(model).values())
    # Early stop ends a recomputed block with an exception, and the hook after its last layer would not run.
    with set_checkpoint_early_stop(False) if holders else nullcontext(), undoing(model) as undo:
        for module in holders:  # the hooks have made `forward` an attribute of each
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
    """Passes aliases of parameters to operations; an alias keeps its data when the parameter's data is replaced."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func.__name__ != "__set__":
            args = tuple(map(_alias, args))
            kwargs = {name: _alias(value) for name, value in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))


def _alias(value: Any) -> Any:
    return value.detach() if isinstance(value, nn.Parameter) else value
