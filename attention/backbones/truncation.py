"""Removes the last layers of a model for a forward pass that does not need them.

Leaving the pass by an exception instead would break `torch.compile` and offloading hooks.
"""

from collections.abc import Iterable

from torch import nn

from lora_compose.attention.claims import Journal


class Kept(nn.ModuleList):
    """The blocks of a list that run; its length stays that of all, by which a model may find modulations."""

    _length = 0  # while the blocks are added, which are counted

    def __init__(self, blocks: Iterable[nn.Module], length: int) -> None:
        super().__init__(blocks)
        self._length = length

    def __len__(self) -> int:
        """The number of blocks in the whole model."""
        return self._length


def replace_children(module: nn.Module, undo: Journal, **children: nn.Module | None) -> None:
    """Replaces some children of a module until `undo` puts them back; None removes one.

    The original children stay registered, under the name `cut_off`. An offloading hook may move the model to its device
    in between, and it does not move it again while its first parameter is there: children that were missing would stay
    behind.
    """
    children = {name: child for name, child in children.items() if name in module._modules}
    before = {name: module._modules[name] for name in children}

    def put_back() -> None:
        module._modules.pop("cut_off", None)
        module._modules.update(before)

    undo.callback(put_back)
    module._modules.update(children)
    module._modules["cut_off"] = nn.ModuleList(child for child in before.values() if child is not None)
