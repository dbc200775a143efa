"""Models that are cut for a forward pass, whose last layers are not needed.

The model is cut rather than left by an exception, which would make `torch.compile` and offloading hooks stumble.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def replaced(module: nn.Module, **children: nn.Module | None) -> Iterator[None]:
    """Inside this block a module has other children under some names, and None where there is to be none.

    What is replaced stays a part of it, under the name `cut_off`: an offloaded model may be brought to its device just
    then, and is not brought there again while its first parameter is there.
    """
    children = {name: child for name, child in children.items() if name in module._modules}
    found = {name: module._modules[name] for name in children}
    try:
        module._modules.update(children)
        module._modules["cut_off"] = nn.ModuleList(child for child in found.values() if child is not None)
        yield
    finally:
        module._modules.pop("cut_off", None)
        module._modules.update(found)
