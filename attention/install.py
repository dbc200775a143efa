"""Installs concepts in a model for the length of a `with` block; all is removed again, also after an exception."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from lora_compose.attention.backbones import Backbone
from lora_compose.attention.bank_cache import Bank, BankKey, KeptBanks, new_bank
from lora_compose.attention.claims import Journal, claimed, undoing
from lora_compose.attention.column_norms import with_column_norms
from lora_compose.attention.device import (
    as_outside_of_inference_mode,
    hooked,
    is_adaptable,
    modules_of,
    to_device,
    uncompiled,
)
from lora_compose.attention.fitting import check_sides, shape_at, shape_of
from lora_compose.attention.forward_state import LayerInputs
from lora_compose.attention.gates import GateKey, Gates, strongest
from lora_compose.attention.joint_regions import JointRegions
from lora_compose.attention.lora_bank import BankLayer, Lora, base_layer
from lora_compose.attention.norm_regions import NormRegions
from lora_compose.attention.placing import Around, How, check_how, put_in, replace_module
from lora_compose.attention.recorder import Recorder
from lora_compose.attention.region_norm import RegionNorm
from lora_compose.attention.regions import RegionAttention
from lora_compose.attention.sites import Site, SitePart
from lora_compose.attention.text_bias import TextBias
from lora_compose.attention.text_kv import TextKV


class Installation:
    """Concepts installed in a model, for as long as the `with` block of `install` or `installed_layers` lasts.

    Attributes:
        bank: The bank layers in place, by name. Fully folded layers are removed from it.
        columns: The LoRA of each concept, if some share one; then it is installed once, and where their gates overlap
            the strongest counts. Gates and weights are by concept all the same.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        loras: Sequence[Lora],
        bank: Bank,
        key: BankKey,
        undo: Journal,
        how: How = "module",
        columns: Sequence[int] = (),
    ) -> None:
        self.columns = tuple(columns)
        self.bank = dict(bank.layers)
        self._keys = _keys_of(self.bank)
        self.state = bank.state
        self._modules = modules
        self._loras = loras
        self._exact = bank.exact
        self._undo = undo
        self._device = key.device
        self._dtype = key.dtype
        self._how: How = how
        self._by_region = False

    def inputs(
        self,
        gates: Gates,
        text: Tensor | None = None,
        regions: RegionAttention | None = None,
        text_kv: TextKV | None = None,
        lengths: Sequence[int] | None = None,
        joint_regions: JointRegions | None = None,
        text_bias: TextBias | None = None,
        read: Sequence[int] | None = None,
        norm_regions: NormRegions | None = None,
    ) -> LayerInputs:
        """Makes the inputs of the layers for one pass. They serve every step, until `fold` is called.

        Args:
            text: The text of the pass. Shape: [rows, tokens, channels], or [texts, rows, tokens, channels] with regions
                that read different texts; layers * channels if each cross-attention layer has a text of its own.
            text_kv: Keys and values to share with another pass that has the same text and the same text gates.
            lengths: Number of tokens in each row, if rows have fewer than `text`.
            text_bias: Added to the scores between image and text; not with `RegionAttention`.
            read: Number of tokens that attention sees in each row, if these are fewer than `lengths`.
            norm_regions: The regions over which group normalisation takes its statistics; None is the whole canvas.
        """
        gates = gates.strongest(self.columns) if self.columns else gates
        lengths = lengths or ([1] if text is None else [text.shape[-2]] * text.shape[-3])
        expanded = {key: gates.expand(key, lengths).to(self._device, self._dtype) for key in self._keys}
        kept = text_kv or (None if text is None else TextKV())
        factors = None if text_bias is None else text_bias.to(self._device)
        scores = {} if factors is None else factors.scores()
        bias = {level: score.to(self._dtype)[:, None] for level, score in scores.items()}
        return LayerInputs(
            expanded, kept, regions, text if regions is not None else None, joint_regions, tuple(lengths),
            gates.latent_grid, bias or None, factors, self._text_end(read or lengths, text),
            None if norm_regions is None else norm_regions.to(self._device),
        )  # fmt: skip

    def _text_end(self, lengths: Sequence[int], text: Tensor | None) -> Tensor | None:
        if text is None or min(lengths) == text.shape[-2]:
            return None
        past = torch.arange(text.shape[-2]) >= torch.tensor(lengths)[:, None]
        return to_device(torch.where(past, -torch.inf, 0.0).to(self._dtype), self._device)[:, None, None]

    def use(self, inputs: LayerInputs, *recorders: Recorder) -> None:
        """Sets what the next pass needs; it stays until it is set again.

        Args:
            recorders: Record the attention maps of the next pass; earlier maps are cleared. They record nothing in a
                second pass unless `use` is called again.
        """
        for recorder in recorders:
            recorder.clear()
        self.state.inputs = inputs
        self.state.recorders = recorders

    def normalise_by_region(self, around: Around | None = None) -> None:
        """Lets group normalisation follow `LayerInputs.norm_regions` until the installation ends.

        Args:
            around: Calls a region norm, where layers act on `forward`.
        """
        if not self._by_region:
            norms = [name for name, module in self._modules.items() if isinstance(module, nn.GroupNorm)]
            put_in(self._modules, {name: RegionNorm(self.state) for name in norms}, self._undo, self._how, around)
            self._by_region = True

    def fold(self, parts: Iterable[SitePart], weights: Sequence[float], stay: Collection[int] = ()) -> int:
        """Adds the deltas of some layers to the weights until the installation ends; they then run at base speed.

        Only for gates that are constant over rows and positions during the whole call. Layers whose weights cannot be
        replaced (offloaded layer by layer, quantised, stored in another precision) stay in the bank, and so still need
        gates.

        Args:
            parts: Layers whose sequence has only such parts.
            weights: The constant gate of every concept.
            stay: Concepts whose gates are not constant; their part of each layer stays in the bank.

        Returns:
            How many layers were folded.

        Raises:
            ValueError: If the layers act on `forward`: weights are then left to others.
        """
        if self._how != "module":
            raise ValueError("LoRAs on `forward` are not folded into weights; install them with how='module' for that")
        if hooked(self._modules.values()):
            return 0  # group offloading and layerwise casting hold on to the weights they found
        if self.columns:
            weights = strongest(torch.tensor(weights), self.columns).tolist()
            stay = {self.columns[index] for index in stay}
        parts = set(parts)
        names = [name for name, layer in self.bank.items() if parts.issuperset(layer.key.site.parts)]
        names = [name for name in names if _foldable(base_layer(self.bank[name].layer), self._dtype)]
        if any(self.bank[name].transforms is not None for name in names):
            self._loras = [with_column_norms(lora, self._modules, self._device, self._dtype) for lora in self._loras]
        gates = [0.0 if index in stay else gate for index, gate in enumerate(weights)]
        columns: dict[tuple[int, ...], Tensor | None] = {}
        folded = 0
        for name in names:
            layer, ranks = self.bank[name], self.bank[name].key.ranks
            adapted = layer.concepts
            if adapted <= set(stay):
                continue
            folded += 1
            if {index for index in adapted if gates[index]}:
                if ranks not in columns:
                    columns[ranks] = self._columns(gates, ranks)
                self._add_to_weight(name, columns[ranks], gates)
            del self.bank[name]
            if adapted & set(stay):
                self.bank[name] = unfolded = layer.only(stay)
                unfolded.act_on(layer.layer)
            replace_module(self._modules, name, self.bank.get(name, layer.layer))
        self._keys = _keys_of(self.bank)
        return folded

    def _columns(self, gates: Sequence[float], ranks: Sequence[int]) -> Tensor | None:
        """The constant gate of every rank; None if all are 1."""
        per_rank = [gate for gate, rank in zip(gates, ranks, strict=True) for _ in range(rank)]
        return None if set(per_rank) == {1.0} else to_device(torch.tensor(per_rank), self._device)

    def _add_to_weight(self, name: str, columns: Tensor | None, gates: Sequence[float]) -> None:
        """Adds the delta of a layer to its weight, in fp32."""
        bank = self.bank[name]
        layer = base_layer(bank.layer)
        weight = layer.get_parameter("weight")
        sums = weight.detach().to(self._device, torch.float32)
        if bank.transforms is not None:  # each relative to the weight as it was found
            loras = ((gates[index], self._loras[index][name]) for index in sorted(bank.concepts) if gates[index])
            sums = sum((gate * factors.change_of(sums) for gate, factors in loras), sums)
            _replace_weight(layer, torch.empty_like(weight).copy_(sums), self._undo)
            return
        sums = sums.flatten(1)
        if bank.ranked:
            down, up = self._exact_factors(name)
            up = up.flatten(1) if columns is None else up.flatten(1) * columns
            sums = torch.addmm(sums, up, down.flatten(1))
        for index in bank.products:
            if gates[index]:
                sums = sums + gates[index] * to_device(self._loras[index][name].delta(), self._device)
        _replace_weight(layer, torch.empty_like(weight).copy_(sums.view(weight.shape)), self._undo)

    def _exact_factors(self, name: str) -> tuple[Tensor, Tensor]:
        """The stacked factors in fp32, kept with the bank."""
        if self._dtype == torch.float32:
            return self.bank[name].down, self.bank[name].up
        if name not in self._exact:
            thin = [lora[name] for lora in self._loras if name in lora and lora[name].left is None]
            downs, ups, *_ = zip(*(factors.in_model(self._device, torch.float32) for factors in thin), strict=True)
            with as_outside_of_inference_mode():
                self._exact[name] = torch.cat(downs), torch.cat(ups, dim=1)
        return self._exact[name]


def _foldable(layer: nn.Module, dtype: torch.dtype) -> bool:
    weight = layer._parameters.get("weight")
    offloaded = weight is not None and weight.is_meta and hasattr(layer, "_hf_hook")
    return type(weight) is nn.Parameter and weight.dtype == dtype and not offloaded


def _replace_weight(layer: nn.Module, weight: Tensor, undo: Journal) -> None:
    original = layer.get_parameter("weight")

    def restore() -> None:
        current = layer.get_parameter("weight")
        if (current.device, current.dtype) != (original.device, original.dtype):  # the model was moved in between
            original.data = original.data.to(current)
        layer._parameters["weight"] = original

    undo.callback(restore)
    layer._parameters["weight"] = nn.Parameter(weight, requires_grad=original.requires_grad)


def installed_layers(
    model: nn.Module,
    loras: Sequence[Lora],
    where: Mapping[str, Site],
    *,
    device: torch.device,
    dtype: torch.dtype,
    silence: Iterable[str] = (),
    kept: KeptBanks | None = None,
    how: How = "module",
) -> AbstractContextManager[Installation]:
    """Puts the bank layers of all concepts into a model: a denoiser or a text encoder.

    Everything is checked before the first change, and every change is undone, also after an exception or Ctrl-C.

    Args:
        loras: The factors of every concept for this model; empty for a concept that does not change it.
        silence: Names of PEFT adapters to switch off, because they take part as concepts.
        kept: Banks of earlier installations, of which one that fits is used, and which gets this one afterwards. LoRAs
            with equal handles are installed once.

    Raises:
        ValueError: For layers that the model does not have or whose shape differs, and for another `how`.
        RuntimeError: If another call uses this model, or concepts are installed in it already.
    """
    return _installed(model, loras, where, None, device, dtype, silence, kept, how)


def install(
    backbone: Backbone,
    loras: Sequence[Lora],
    *,
    device: torch.device,
    dtype: torch.dtype,
    silence: Iterable[str] = (),
    kept: KeptBanks | None = None,
    how: How = "module",
) -> AbstractContextManager[Installation]:
    """Puts concepts into a denoiser: bank layers for adapted layers, our processors for attention layers.

    Args and errors as for `installed_layers`; also raises ValueError for attention processors that ours cannot replace
    without changing what they do.
    """
    return _installed(backbone.model, loras, backbone.sites, backbone, device, dtype, silence, kept, how)


def _keys_of(bank: Mapping[str, BankLayer]) -> Collection[GateKey]:
    """The gates that the layers of a bank need."""
    return {key for layer in bank.values() for key in layer.keys}


@contextmanager
def _installed(
    model: nn.Module, loras: Sequence[Lora], where: Mapping[str, Site], backbone: Backbone | None, device: torch.device,
    dtype: torch.dtype, silence: Iterable[str], kept: KeptBanks | None, how: How,
) -> Iterator[Installation]:  # fmt: skip
    """Puts LoRAs into a model, and with a backbone our attention, too."""
    check_how(how)
    model = uncompiled(model)
    with claimed([model], "install"), undoing(model) as undo:
        loras, kept, columns = _each_once(loras, kept)
        modules, key = modules_of(model), BankKey(kept.handles if kept else (), device, dtype)
        known = kept.cache.take(key) if kept else None
        bank = _fitting(known, modules, loras, where, key, kept, backbone.same_input if backbone else ())
        if kept:
            undo.callback(kept.cache.put, key, bank)
        if backbone:
            backbone.steer(modules, bank.state, undo)
        _silence(modules.values(), frozenset(silence), undo)
        put_in(modules, bank.layers, undo, how)
        yield Installation(modules, loras, bank, key, undo, how, columns)


def bank_for(
    model: nn.Module,
    loras: Sequence[Lora],
    where: Mapping[str, Site],
    *,
    device: torch.device,
    dtype: torch.dtype,
    known: Bank | None = None,
) -> Bank:
    """A bank for `installed_bank`: the known one if it fits the model in this precision, otherwise a new one.

    Args:
        device: Where a new one is made.

    Raises:
        ValueError: For layers that the model does not have or whose shape differs.
    """
    if known is not None and any(layer.up.dtype != dtype for layer in known.layers.values()):
        known = None
    return _fitting(known, modules_of(uncompiled(model)), loras, where, BankKey((), device, dtype), None, ())


@contextmanager
def installed_bank(
    model: nn.Module, bank: Bank, *, device: torch.device, dtype: torch.dtype, around: Around
) -> Iterator[Installation]:
    """Lets a bank of `bank_for` act on the `forward` of a model's layers; it stays the caller's, who may move it.

    Args:
        device: The device of the passes; the bank may be on another one.
        around: Calls a bank layer, e.g. with its factors on the device of the input.

    Raises:
        RuntimeError: As for `installed_layers`.
    """
    model = uncompiled(model)
    with claimed([model], "install"), undoing(model) as undo:
        modules = modules_of(model)
        undo.callback(bank.rest)
        put_in(modules, bank.layers, undo, "forward", around)
        yield Installation(modules, (), bank, BankKey((), device, dtype), undo, "forward")


def _each_once(
    loras: Sequence[Lora], kept: KeptBanks | None
) -> tuple[Sequence[Lora], KeptBanks | None, tuple[int, ...]]:
    """The LoRAs with different handles, and by concept the index of its LoRA; no indices if all are different."""
    handles = () if kept is None else kept.handles
    own = [handles.index(handle) for handle in handles]
    if kept is None or len(set(own)) == len(own):
        return loras, kept, ()
    once = sorted(set(own))
    columns = tuple(once.index(index) for index in own)
    kept = KeptBanks(kept.cache, tuple(handles[index] for index in once))
    return [loras[index] for index in once], kept, columns


def _fitting(
    known: Bank | None,
    modules: Mapping[str, nn.Module],
    loras: Sequence[Lora],
    where: Mapping[str, Site],
    key: BankKey,
    kept: KeptBanks | None,
    same_input: Iterable[Sequence[str]],
) -> Bank:
    """A known bank if it fits the model, or a new one. Nothing is installed yet."""
    if known is not None and all(_fits(modules, name, layer, where) for name, layer in known.layers.items()):
        return known
    shapes = {name: shape_at(name, modules.get(name), where) for lora in loras for name in lora}
    for lora in loras:
        for name, factors in lora.items():
            check_sides(name, factors, *shapes[name])
    return new_bank(loras, where, key, kept, same_input, modules)


def _fits(modules: Mapping[str, nn.Module], name: str, layer: BankLayer, where: Mapping[str, Site]) -> bool:
    """Whether a layer of a bank that was kept can stand in for the layer of that name."""
    site, kept_site = where.get(name), layer.key.site
    if name not in modules or not (site is kept_site or site == kept_site):  # comparing fields takes longer
        return False
    base = base_layer(modules[name])
    if layer.transforms is not None and not all(of.is_of(base) for of in layer.transforms.of.values()):
        return False
    return is_adaptable(base) and shape_of(name, base) == layer.weight_shape


def _silence(modules: Iterable[nn.Module], adapters: frozenset[str], undo: Journal) -> None:
    """Sets the scaling of PEFT adapters to zero, as `peft.helpers.rescale_adapter_scale` scales it."""
    for module in modules:
        scaling = module.__dict__.get("scaling")
        if isinstance(scaling, dict) and "base_layer" in module._modules:
            undo.callback(scaling.update, dict(scaling))  # all of them: diffusers resets them after a pass at scale 0
            scaling.update(dict.fromkeys(adapters & scaling.keys(), 0.0))
