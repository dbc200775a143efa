"""Banks of LoRAs that were installed before: taken out of the model after a call, and kept for the next."""

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_compose.attention.column_norms import with_column_norms
from lora_compose.attention.device import as_outside_of_inference_mode
from lora_compose.attention.forward_state import ForwardState, LayerInputs
from lora_compose.attention.lora_bank import BankLayer, LayerFactors, Lora, LoraFactors, base_layer, share_input
from lora_compose.attention.sites import Site

Handle = tuple[Hashable, ...]
"""Stands for a LoRA: equal handles, equal factors. It begins with the handle of the file that the LoRA is from, or with
`PASSING`."""

PASSING = "of this call alone"
"""Begins the handle of a LoRA that may be another one in the next call."""


class BankKey(NamedTuple):
    """LoRAs, device and precision of a bank: values, so that a bank serves whoever asks for the same."""

    loras: tuple[Handle, ...]
    device: torch.device
    dtype: torch.dtype


@dataclass(eq=False)
class Bank:
    """The bank layers of some LoRAs; while they are not installed, they hold no part of a model.

    Attributes:
        exact: Stacked factors in fp32, to be added to weights, by name; of layers for which these were needed.
    """

    layers: Mapping[str, BankLayer]
    state: ForwardState
    exact: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def rest(self) -> None:
        """Holds nothing of a call any more."""
        self.state.inputs, self.state.recorders = LayerInputs(), ()

    @property
    def bytes(self) -> int:
        """The memory that it takes."""
        return self._bytes_of_layers + sum(tensor.nbytes for pair in self.exact.values() for tensor in pair)

    @cached_property
    def _bytes_of_layers(self) -> int:
        """The memory of its layers, counted once: a bank whose precision has changed is not kept."""
        return sum(tensor.nbytes for layer in self.layers.values() for tensor in layer.tensors)


class BankCache:
    """LRU cache of banks, bounded in bytes.

    A bank that is installed is not in it: it is taken out, and put back when the call is over.

    Attributes:
        limit: Bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._banks: OrderedDict[BankKey, Bank] = OrderedDict()

    @property
    def bytes(self) -> int:
        """The memory that all banks take."""
        return sum(bank.bytes for bank in self._banks.values())

    def __len__(self) -> int:
        return len(self._banks)

    def take(self, key: BankKey) -> Bank | None:
        """Takes a bank out, if there is one."""
        return self._banks.pop(key, None)

    def put(self, key: BankKey, bank: Bank) -> None:
        """Puts a bank in; the least recently used go until the rest fits.

        It replaces banks of the same LoRAs on another device or in another precision, and beside other LoRAs of one
        call alone. A bank that was moved or converted with its model during the call is dropped.
        """
        bank.rest()
        if not all(_as_made(tensor, key) for layer in bank.layers.values() for tensor in layer.tensors):
            return
        lasting = _lasting(key)
        for other in [
            other for other in self._banks if _lasting(other) == lasting and len(other.loras) == len(key.loras)
        ]:
            del self._banks[other]
        self._banks[key] = bank
        self.trim()

    def trim(self) -> None:
        """Drops the least recently used banks until the rest fits."""
        excess = self.bytes - self.limit
        for key in list(self._banks):
            if excess <= 0:
                break
            excess -= self._banks.pop(key).bytes

    def factors(self, handle: Handle, device: torch.device, dtype: torch.dtype) -> "ByLayer | None":
        """The factors of one LoRA, as they are in some bank, without copying anything."""
        for key, bank in self._banks.items():
            if handle in key.loras and (key.device, key.dtype) == (device, dtype):
                column = key.loras.index(handle)
                return {name: layer.factors(column) for name, layer in bank.layers.items() if column in layer.concepts}
        return None

    def forget(self, file: Hashable) -> None:
        """Drops all banks with LoRAs of a file, whose handles begin with its own."""
        for key in [key for key in self._banks if file in {handle[0] for handle in key.loras}]:
            del self._banks[key]

    def clear(self) -> None:
        """Drops all banks."""
        self._banks.clear()


def _lasting(key: BankKey) -> tuple[Handle, ...]:
    return tuple(handle for handle in key.loras if handle[0] != PASSING)


def _as_made(tensor: Tensor, key: BankKey) -> bool:
    unmoved = tensor.device.type == key.device.type and tensor.dtype == key.dtype
    return unmoved and not tensor.is_inference()


@dataclass(frozen=True, eq=False)
class KeptBanks:
    """The cache from which the bank of an installation may come, and into which it goes.

    Attributes:
        handles: One for each LoRA; equal ones stand for the same factors.
    """

    cache: BankCache
    handles: tuple[Handle, ...]


ByLayer = Mapping[str, LayerFactors]
"""The factors of one LoRA as a bank has them, by layer."""


def new_bank(
    loras: Sequence[Lora],
    where: Mapping[str, Site],
    key: BankKey,
    kept: KeptBanks | None,
    same_input: Iterable[Sequence[str]],
    modules: Mapping[str, nn.Module],
) -> Bank:
    """A bank made of factors that are on the device already, where there are some.

    Args:
        same_input: Names of layers that read the same input.
        modules: The modules of the model, whose weights transforms are made from.

    Raises:
        ValueError: If the weight of a layer with a transform is not to be had, or would be multiplied by too much.
    """
    known: Sequence[ByLayer | None] = [None] * len(loras)
    if kept:
        known = [kept.cache.factors(handle, key.device, key.dtype) for handle in key.loras]
        known = [lora if lora is not None and _up_to_date(lora, modules) else None for lora in known]
    loras = [
        lora if of_lora else with_column_norms(lora, modules, key.device, key.dtype)
        for lora, of_lora in zip(loras, known, strict=True)
    ]
    state, layers = ForwardState(), {}
    with as_outside_of_inference_mode():
        for name in dict.fromkeys(name for lora in loras for name in lora):
            parts = {
                index: _factors(name, lora[name], of_lora, key, modules[name])
                for index, (lora, of_lora) in enumerate(zip(loras, known, strict=True))
                if name in lora
            }
            layers[name] = BankLayer(parts, where[name], len(loras), state)
        for names in same_input:
            if layers.keys() >= set(names):
                share_input([layers[name] for name in names])
    return Bank(layers, state)


def _up_to_date(lora: ByLayer, modules: Mapping[str, nn.Module]) -> bool:
    """Whether all layers still have the weights from which transforms were made."""
    return all(
        factors.transform is None or factors.transform.of.is_of(base_layer(modules[name]))
        for name, factors in lora.items()
    )


def _factors(name: str, factors: LoraFactors, known: ByLayer | None, key: BankKey, layer: nn.Module) -> LayerFactors:
    """The factors of one LoRA in one layer: those that are known, if there are any."""
    if known is not None:
        return known[name]
    try:
        return factors.in_model(key.device, key.dtype, layer)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
