"""A LoRA file by its own layer names, for models that have no backbone here."""

from collections.abc import Mapping
from dataclasses import dataclass

from lora_compose.attention.lora_bank import LoraFactors
from lora_compose.pipelines.formats.alphas import Alphas
from lora_compose.pipelines.formats.files import LoraError, LoraFile
from lora_compose.pipelines.formats.keys import Part, parse
from lora_compose.pipelines.formats.kinds import LOW_RANK
from lora_compose.pipelines.formats.layers import Layer, by_layer
from lora_compose.pipelines.formats.names import present_name


@dataclass(frozen=True, eq=False)
class Named:
    """A layer's change under the name that a file gives it; `stem` begins all its keys."""

    stem: str
    factors: LoraFactors


def by_name(file: LoraFile, *, alpha: float | None = None) -> tuple[Mapping[tuple[Part, str], Named], tuple[str, ...]]:
    """A file's changes by part and name, with underscores for dots; and the keys that cannot be used.

    Only plain LoRAs are read. The product of another adapter's tensors would have to be checked against the size of the
    model's layer, which is unknown.

    Args:
        alpha: Alpha for a file without one.

    Raises:
        LoraError: If it is not a plain LoRA, or a layer is incomplete or damaged.
    """
    grouped = by_layer(file)
    alphas = Alphas(file, alpha)
    layers: dict[tuple[Part, str], Named] = {}
    for layer in grouped.layers:
        if layer.refused:
            raise LoraError(f"{file.path.name} is {layer.refused}")
        stem, name = _spelled(layer.keys[0])
        where = layer.part, present_name(layer.module)
        if where in layers:
            raise LoraError(f"{file.path.name} has more than one LoRA for {name}; expected one adapter")
        try:
            layers[where] = Named(stem, _factors(layer, alphas.scale(name, layer)))
        except LoraError:
            raise
        except (ValueError, TypeError, ArithmeticError) as error:
            raise LoraError(f"{file.path.name}: {name}: {error}") from error
    return layers, (*grouped.unknown, *grouped.inexpressible)


def _factors(layer: Layer, scale: float) -> LoraFactors:
    if layer.kind is not LOW_RANK:
        raise ValueError(
            f"it has {', '.join(sorted(layer.parts))}; where the sizes of its layers are not known, only plain LoRAs "
            "(lora_A and lora_B, or lora_down and lora_up) can be read"
        )
    return LOW_RANK.load(layer.parts, scale).factors


def _spelled(text: str) -> tuple[str, str]:
    """Prefix and name, and the name alone, of a key of a layer."""
    key = parse(text)
    if key is None:
        raise ValueError(f"{text!r} is not a key of an adapter")
    stem = text.removesuffix(key.suffix)
    return stem, stem.removeprefix(key.prefix)
