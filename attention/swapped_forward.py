"""A `forward` that stands on a module, e.g. a bank layer's: the way into a model that leaves its modules in place."""

from collections.abc import Callable
from typing import Any

from torch import nn


class SwappedForward:
    """Stands on a module as its attribute `forward`, until it is taken off.

    Other programs swap this attribute too, and not always in the reverse order. So nothing is put back over what
    another has put there since; if that still calls this one, it passes calls on.

    Attributes:
        layer: What is called instead, e.g. a bank layer; None once it has been taken off.
        original: The `forward` that was there: the class's own, a PEFT layer's, or that of an offloading hook.
    """

    def __init__(self, module: nn.Module, layer: Callable[..., Any]) -> None:
        self.layer: Any = layer
        self.original: Callable[..., Any] = module.forward
        self._attributes = vars(module)
        self._own = "forward" in self._attributes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output, e.g. with the deltas of a bank layer."""
        return (self.original if self.layer is None else self.layer)(*args, **kwargs)

    def put_on(self) -> None:
        """Puts itself on the module."""
        self._attributes["forward"] = self

    def take_off(self) -> None:
        """Takes itself off the module; does nothing the second time."""
        self.layer = None
        if self._attributes.get("forward") is self:
            if self._own:
                self._attributes["forward"] = self.original
            else:
                del self._attributes["forward"]
