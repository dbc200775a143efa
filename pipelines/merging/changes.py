"""The changes that several LoRAs make to the same layers, side by side, and how a merger is begun on them."""

import math
from collections.abc import Mapping, Sequence

from lora_compose.attention.lora_bank import LoraFactors
from lora_compose.pipelines.formats.files import LoraError
from lora_compose.pipelines.formats.keys import Part
from lora_compose.pipelines.merging.concatenation import Cat
from lora_compose.pipelines.merging.factors import absent, scaled, spectrum
from lora_compose.pipelines.merging.merger import Changes, MergeLayer, Merger

Name = tuple[Part, str]
"""A part of the pipeline, and a layer of it."""


def side_by_side(
    loras: Sequence[Mapping[Name, LoraFactors]], weights: Sequence[float], called: Sequence[str]
) -> Mapping[Name, Changes]:
    """By layer, the change by every LoRA, with its weight; rank 0 where it does not change the layer.

    Raises LoraError, which names them as `called`, for changes of different sizes of a layer.
    """
    by_layer: dict[Name, Changes] = {}
    for name in dict.fromkeys(name for lora in loras for name in lora):
        here = {i: lora[name] for i, lora in enumerate(loras) if name in lora}
        sizes = {i: (len(f.up), math.prod(f.down.shape[1:])) for i, f in here.items()}
        if len(set(sizes.values())) > 1:
            told = "; ".join(f"{called[i]} {a} x {b}" for i, (a, b) in sizes.items())
            raise LoraError(f"the files do not fit each other: {'.'.join(name)} is changed by {told}")
        some = next(iter(here.values()))
        by_layer[name] = [
            scaled(_compact(here[i]), weight) if i in here and weight else absent(some)
            for i, weight in enumerate(weights)
        ]
    return by_layer


def begin(merger: Merger, layers: Sequence[Changes], weights: Sequence[float]) -> MergeLayer:
    """The function that merges each layer. If only one LoRA has a weight, it stays as it is."""
    alone = sum(weight != 0 for weight in weights) == 1
    return (Cat() if alone and merger.resolves else merger).start(layers)


def check_number(merger: Merger, method: str, number: int) -> None:
    """Raises ValueError if a merger cannot take so many LoRAs."""
    if merger.pair and number != 2:
        raise ValueError(f"{method} takes two files, a subject and then a style; {number} were given")


def _compact(change: LoraFactors) -> LoraFactors:
    """The change with no more ranks than its layer can need: more cost time and memory, and files can have any."""
    most = min(len(change.up), math.prod(change.down.shape[1:]))
    return change if change.rank <= most else spectrum(change).factors()
