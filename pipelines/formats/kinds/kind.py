"""What a kind of LoRA is; each stands in a file of its own."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lora_compose.attention.transforms import Transform
from lora_compose.pipelines.formats.change import MAX_RANK, Change, cut, matrix, shaped

Shapes = Mapping[str, Sequence[int]]
"""The shapes of a layer's tensors, by slot."""
Tensors = Mapping[str, Tensor]
"""A layer's tensors, by slot."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Placement:
    """What of a file's layer belongs to one layer of the model.

    Attributes:
        outputs: Slice of the change's outputs that this layer has; None means all.
        fused: Names of the layers of the model that are this one in the file; empty if it is one layer there as well.
        swapped: Whether the halves of the change's outputs are the other way round in the model.
    """

    outputs: slice | None = None
    fused: tuple[str, ...] = ()
    swapped: bool = False


def _unread(given: Shapes | Tensors) -> NoReturn:
    raise ValueError(f"{', '.join(sorted(given))} cannot be read")


@dataclass(frozen=True, eq=False)
class Kind:
    """A kind of LoRA: the names of its tensors, and the change of a weight that they are.

    Small tensors can have a huge product, and files are not trusted: `sides` is asked first, and has nothing but shapes
    to multiply. The rest is called only where they are those of the model's layer.

    Attributes:
        name: As users know it.
        endings: By slot (what a tensor is), a regular expression for the end of its key, from the dot after the layer's
            name. No groups that capture; repetitions possessive and few, so that no crafted key is slow to match.
        sides: Outputs and inputs (times the cells of the kernel) of the change; None for one that shapes do not tell.
            Raises ValueError if tensors are missing, do not fit each other, or have more rank than sides.
        delta: The change, whole and at scale 1, in the weight's shape.
        factors: The change as factors at scale 1, from tensors, the rank they are kept to, and whether a Kronecker
            product may stay one. None, or a result of None: they are the best of `delta`.
        beside: Slots of other kinds that it needs as well.
        ranked: The slots whose first side divides alpha; the first of them that a layer has counts.
        scaled: Whether alpha has an effect at all.
        refused: Why files of this kind are refused, as in "it is a ..."; empty if they are read.
        transform: The transform of a base weight in a file's tensors and settings; None for kinds that only add to it.
        placed: Of a transform as the file has it, the one of a layer of the model. Raises ValueError if it has none of
            its own.
        unclear: Why the change of a layer of the model has no one meaning, told whether PEFT wrote the file; empty if
            it has one.
        split: Of the slots of a fused layer that a file has in parts, those of each part in order, by what they are
            there. None, or no result: outputs are shared out.
        left_out: Whether these tensors are left out, and the rest of the file is used.
        of_norms: Whether tensors of one dimension, which norms have, are left out.
        numbers: By slot, the ends of keys with a single number that stands beside the tensors of a layer.
        flags: The same for those that are true or false.
        setting: PEFT's setting that switches this kind on.
    """

    name: str
    endings: Mapping[str, str]
    sides: Callable[[Shapes], tuple[int | None, int | None]] = _unread
    delta: Callable[[Tensors], Tensor] = _unread
    factors: Callable[[Tensors, int, bool], Change | None] | None = None
    transform: Callable[[Tensors, Mapping[str, Any]], Transform] | None = None
    placed: Callable[[Any, Placement, nn.Module], Transform] | None = None
    unclear: Callable[[nn.Module, bool], str] | None = None
    split: Callable[[Collection[str]], Sequence[Mapping[str, str]]] | None = None
    beside: Collection[str] = ()
    ranked: Sequence[str] = ()
    scaled: bool = True
    refused: str = ""
    left_out: bool = False
    of_norms: bool = False
    numbers: dict[str, str] = field(default_factory=dict)
    flags: dict[str, str] = field(default_factory=dict)
    setting: str = ""

    def load(
        self,
        tensors: Tensors,
        scale: float,
        max_rank: int = MAX_RANK,
        *,
        products: bool = False,
        settings: Mapping[str, Any] | None = None,
    ) -> Change:
        """The change of one layer as factors.

        Args:
            tensors: May build a product as large as `sides` says; compare that with the layer first.
            scale: Factor on the change.
            max_rank: Changes of adapters other than LoRA are kept exactly up to this rank, and cut to it beyond.
            products: Whether a Kronecker product of more rank may stay one, which is exact.
            settings: PEFT's settings, and the alpha of the layer; for kinds with a transform.

        Raises:
            ValueError: As `sides`, and if the numbers are too large.
        """
        self.sides({slot: tensor.shape for slot, tensor in tensors.items()})
        made = None if self.factors is None else self.factors(tensors, max_rank, products)
        if made is None:
            whole = self.delta(tensors)
            made = shaped(*cut(matrix(whole), max_rank), whole.shape[1:])
        scale = scale if self.scaled else 1.0
        transform = None if self.transform is None else self.transform(tensors, settings or {})
        return Change(replace(made.factors, scale=scale, transform=transform), made.lost * scale**2)


def first_of(kinds: Iterable[Kind], slots: Collection[str]) -> Kind | None:
    """The first kind that has an ending for one of a layer's tensors; None if none has."""
    return next((kind for kind in kinds if not kind.endings.keys().isdisjoint(slots)), None)


def check_own(kind: Kind, slots: Collection[str]) -> None:
    """Raises ValueError if a layer has tensors of another kind as well."""
    if others := sorted({*slots} - {*kind.endings, *kind.beside}):
        raise ValueError(f"it has {', '.join(others)} beside the tensors of a {kind.name}; expected one kind by layer")


def needed(shapes: Shapes, *slots: str) -> list[Sequence[int]]:
    """The shapes of some tensors. Raises ValueError if one is missing."""
    if missing := [slot for slot in slots if slot not in shapes]:
        raise ValueError(f"it has {', '.join(sorted(shapes))}, but no {' or '.join(missing)}; the file is incomplete")
    return [shapes[slot] for slot in slots]


def rows(shapes: Shapes, slot: str) -> int:
    """The first side of a tensor. Raises ValueError if it has no second."""
    if len(shapes[slot]) < 2:
        raise ValueError(f"{slot} has shape {list(shapes[slot])}; expected a matrix")
    return shapes[slot][0]


def columns(shapes: Shapes, slot: str) -> int:
    """The product of the other sides. Raises as `rows`."""
    return rows(shapes, slot) and math.prod(shapes[slot][1:])


def check_rank(rank: int, outputs: int, inputs: int) -> None:
    """Bounds the rank: the cost of a product grows with it, and a layer with one tiny side would not limit it."""
    limit = max(outputs, inputs, MAX_RANK)
    if rank > limit:
        raise ValueError(f"its factors have rank {rank}, more than the {limit} that a change of this size can need")


def own_outputs(transform: Transform, place: Placement) -> Tensor:
    """The values of a transform of outputs that belong to one layer. Raises ValueError if blocks reach over layers."""
    values = transform.values
    size = transform.size // len(values)
    if place.outputs is not None:
        if place.outputs.start % size or place.outputs.stop % size:
            raise ValueError(f"its blocks of size {size} reach over the layers of the model that it changes")
        values = values[place.outputs.start // size : place.outputs.stop // size]
    if place.swapped:
        if len(values) % 2:
            raise ValueError(
                f"one of its {len(values)} blocks reaches over halves that the model has the other way round"
            )
        values = torch.cat(values.chunk(2)[::-1])
    return values
