"""The keys of a file grouped by layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from lora_compose.pipelines.formats import kinds
from lora_compose.pipelines.formats.files import LoraError, LoraFile
from lora_compose.pipelines.formats.keys import Part, parse
from lora_compose.pipelines.formats.kinds.kind import Placement


@dataclass(frozen=True, eq=False)
class Layer(Placement):
    """The tensors of a file for one layer.

    Attributes:
        module: The layer as the file spells it, with underscores for dots.
        slots: The tensors by what they are (`Key.slot`).
        keys: The keys of the tensors in the file.
    """

    part: Part
    module: str
    slots: Mapping[str, Tensor]
    keys: tuple[str, ...]

    @cached_property
    def parts(self) -> Mapping[str, Tensor]:
        """The tensors whose product is the change, without single numbers."""
        return {slot: tensor for slot, tensor in self.slots.items() if slot not in kinds.numbers()}

    @cached_property
    def shapes(self) -> kinds.Shapes:
        """The shapes of the parts."""
        return {slot: tensor.shape for slot, tensor in self.parts.items()}

    @cached_property
    def kind(self) -> kinds.Kind:
        """The kind of LoRA that it is; errors as for `kind_of`."""
        return kinds.kind_of(self.parts)

    @cached_property
    def refused(self) -> str:
        """Why files with it are refused, as in "it is a ...", and the key that says so; empty if they are not."""
        for kind in (kind for kind in kinds.KINDS if kind.refused):
            for slot, key in zip(self.slots, self.keys, strict=True):
                if slot in kind.endings:
                    return f"{kind.refused} (key {key!r})"
        return ""

    @property
    def apart(self) -> Sequence["Layer"]:
        """The parts of a fused layer that the file has apart, in order; none if it has the layer as a whole."""
        split = None if self.refused else self.kind.split
        keys = dict(zip(self.slots, self.keys, strict=True))
        return [
            replace(
                self,
                slots={slot: self.slots[own] for slot, own in part.items()},
                keys=tuple(keys[own] for own in part.values()),
            )
            for part in (() if split is None else split(self.slots))
        ]

    def same(self, other: "Layer") -> bool:
        """Whether two layers have the same tensors."""
        return self.slots.keys() == other.slots.keys() and all(
            torch.equal(tensor, other.slots[slot]) for slot, tensor in self.slots.items()
        )


@dataclass(frozen=True, eq=False)
class Layers:
    """All keys of a file.

    Attributes:
        layers: The layers whose weights the file changes.
        inexpressible: Keys with biases and norms, which no low-rank change of a weight can express.
        unknown: Keys that belong to no known adapter.
    """

    layers: Sequence[Layer]
    inexpressible: tuple[str, ...]
    unknown: tuple[str, ...]


def by_layer(file: LoraFile) -> Layers:
    """Gathers the keys of a file. LoraError if two are the same tensor of a layer, as in a file with two adapters."""
    slots_by_layer: dict[tuple[Part, str], dict[str, str]] = {}
    inexpressible, unknown = [], []
    for name in file.tensors:
        key = parse(name)
        if key is None:
            unknown.append(name)
        elif key.kind is not None and (key.kind.left_out or (key.kind.of_norms and file.tensors[name].dim() == 1)):
            inexpressible.append(name)
        else:
            slots = slots_by_layer.setdefault((key.part, key.module), {})
            if key.slot in slots and not (key.kind and key.kind.refused):  # those have several tensors in one slot
                raise LoraError(
                    f"{file.path.name} has more than one LoRA for {key.part}.{key.module} ({slots[key.slot]}, {name}); "
                    "expected one adapter"
                )
            slots[key.slot] = name
    layers = [
        Layer(part, module, {slot: file.tensors[name] for slot, name in slots.items()}, tuple(slots.values()))
        for (part, module), slots in slots_by_layer.items()
    ]
    return Layers(layers, tuple(inexpressible), tuple(unknown))
