"""In place of modules, or on their `forward`: the same numbers; the second way leaves all modules where they are."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from components import EVERYTHING, installed, random_lora, seeded, tiny_pipeline, tiny_unet, unet_inputs, with_bank
from flux import flux_transformer
from ip_adapters import with_ip_adapters
from lora_compose.attention import (
    BankCache,
    Gates,
    How,
    KeptBanks,
    Lora,
    LoraFactors,
    Site,
    backbone_of,
    bank_for,
    install,
    installed_bank,
    installed_layers,
)
from lora_compose.attention.lora_bank import BankLayer, outputs_of
from model_snapshot import Snapshot
from reference import constant_gates, random_gates, relative_error
from transformer_families import TOKENS

WAYS: tuple[How, ...] = ("module", "forward")
ON: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
SIZE = 0.1


class Operations(TorchDispatchMode):
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def with_adapter(unet: Any) -> Any:
    """The UNet with PEFT layers around some of its own."""
    torch.manual_seed(3)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "conv1"], init_lora_weights=False), "style")
    return unet


@pytest.mark.parametrize("nested", [False, True], ids=["plain layers", "PEFT layers"])
@torch.no_grad()
def test_both_ways_give_the_same_bits_with_the_same_operations(nested: bool) -> None:
    """Of linear layers, convolutions, and layers that share the product of their input."""
    model = tiny_unet()
    loras = [random_lora(model, seed, rank=1 + seed, size=SIZE, targets=EVERYTHING) for seed in (1, 2)]
    model = with_adapter(model) if nested else model
    inputs = unet_inputs(model)
    base = model(**inputs)[0]
    gates, _ = random_gates("everything", rows=2, tokens=7, concepts=2, latent_grid=(16, 16))
    before, found, counted = Snapshot(model), {}, {}
    for how in WAYS:
        with Operations() as operations:
            found[how] = with_bank(model, loras, gates, inputs, how=how)
        counted[how] = operations.counts
        before.assert_unchanged(model)
    assert torch.equal(found["forward"], found["module"])
    assert counted["forward"] == counted["module"]
    assert relative_error(found["module"], base) > 0.1
    assert torch.equal(model(**inputs)[0], base)


@torch.no_grad()
def test_both_ways_give_the_same_bits_in_a_transformer() -> None:
    torch.manual_seed(0)
    model, generator = flux_transformer(), seeded(1)
    latents, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, TOKENS, 24, generator=generator)
    added = {"pooled_projections": torch.randn(2, 24, generator=generator)}
    backbone, before = backbone_of(model), Snapshot(model)
    lora = random_lora(model, 1, size=SIZE, targets=tuple(backbone.sites))
    given = (latents, torch.tensor(500.0), text, added)
    outputs = [backbone.forward(*given, guidance=torch.full((2,), 3.5))]
    for how in WAYS:
        with install(backbone, [lora], **ON, how=how) as installation:
            ones = Gates(torch.ones(1, 1, 1), {1: torch.rand(2, 16, 1, generator=seeded())}, torch.ones(1, 1), (8, 8))
            installation.use(installation.inputs(ones, text))
            outputs.append(backbone.forward(*given, guidance=torch.full((2,), 3.5)))
        before.assert_unchanged(model)
    assert torch.equal(outputs[2], outputs[1])
    assert relative_error(outputs[1], outputs[0]) > 0.1


@torch.no_grad()
def test_a_kronecker_product_acts_on_forward_too() -> None:
    model, generator = nn.Sequential(nn.Linear(6, 4)), seeded()
    down, up, left = (torch.randn(*shape, generator=generator) for shape in ((1, 3), (2, 1), (2, 2)))
    lora, x = {"0": LoraFactors(down, up, 0.5, left)}, torch.randn(1, 5, 6, generator=generator)
    expected = model(x) + x @ lora["0"].delta().t()
    for how in WAYS:
        with installed_layers(model, [lora], {"0": Site("text")}, **ON, how=how) as there:
            there.use(there.inputs(constant_gates((1.0,))[0]))
            torch.testing.assert_close(model(x), expected)


@torch.no_grad()
def test_on_forward_modules_and_keys_of_the_state_dict_stay_and_in_place_they_do_not() -> None:
    pipe = with_ip_adapters(tiny_pipeline())  # their processors are modules, with parameters
    unet = pipe.unet
    loras = [random_lora(unet, 1, targets=EVERYTHING)]
    keys, modules = list(unet.state_dict()), dict(unet.named_modules())
    assert any(".processor." in key for key in keys)
    before = Snapshot(unet)
    with installed(unet, loras, how="forward"):
        assert list(unet.state_dict()) == keys
        now = dict(unet.named_modules())
        assert list(now) == list(modules)
        assert [name for name in now if now[name] is not modules[name]] == []
        assert all(vars(modules[name])["forward"] for name in loras[0])
    before.assert_unchanged(unet)
    with installed(unet, loras):
        assert len(set(keys) - set(unet.state_dict())) > 50
        assert {key for key in keys if ".processor." in key} <= set(unet.state_dict())
    before.assert_unchanged(unet)


@torch.no_grad()
def test_a_bank_that_was_kept_serves_both_ways() -> None:
    unet = tiny_unet()
    inputs, loras, gates = unet_inputs(unet), [random_lora(unet, 1, size=SIZE)], constant_gates((0.8,))[0]
    kept, found = KeptBanks(BankCache(1 << 30), (("cat", 1),)), []
    for how in ("module", "forward", "module"):
        with install(backbone_of(unet), loras, **ON, kept=kept, how=how) as installation:
            layers = list(installation.bank.values())
            installation.use(installation.inputs(gates, inputs["encoder_hidden_states"]))
            found.append((layers, unet(**inputs)[0]))
        held = [layer for layer in layers if "layer" in layer._modules or layer.original_forward is not None]
        assert not held, "nothing of the model"
    for layers, output in found[1:]:
        assert all(layer is first for layer, first in zip(layers, found[0][0], strict=True))
        assert torch.equal(output, found[0][1])


def group() -> tuple[nn.ModuleDict, Lora, Tensor, Callable[[], list[Tensor]]]:
    """Two layers with the same input that share a product, and what they give."""
    generator = seeded()
    model = nn.ModuleDict({name: nn.Linear(6, 4) for name in "kv"})
    lora = {
        name: LoraFactors(torch.randn(2, 6, generator=generator), torch.randn(4, 2, generator=generator))
        for name in model
    }
    x = torch.randn(1, 5, 6, generator=generator)
    return model, lora, x, lambda: outputs_of(list(model.values()), x)


@torch.no_grad()
def test_a_bank_that_is_given_acts_through_what_the_caller_calls_and_stays_the_callers() -> None:
    model, lora, x, _ = group()
    where, before = {name: Site("text") for name in model}, Snapshot(model)
    gates, called = constant_gates((0.5,))[0], []
    with installed_layers(model, [lora], where, **ON, how="forward") as there:
        there.use(there.inputs(gates))
        expected = [layer(x) for layer in model.values()]

    def around(layer: BankLayer) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            called.append(layer)
            return layer(x)

        return call

    bank = bank_for(model, [lora], where, **ON)
    with installed_bank(model, bank, **ON, around=around) as there:
        there.use(there.inputs(gates))
        assert all(torch.equal(layer(x), wanted) for layer, wanted in zip(model.values(), expected, strict=True))
    assert called == [*bank.layers.values()]
    assert not bank.state.inputs.gates
    before.assert_unchanged(model)
    assert bank_for(model, [lora], where, **ON, known=bank) is bank
    assert bank_for(model, [lora], where, **{**ON, "dtype": torch.float16}, known=bank) is not bank
    wider = nn.ModuleDict({name: nn.Linear(6, 8) for name in "kv"})
    with pytest.raises(ValueError, match=r"k: the factors have shapes \[2, 6\] and \[4, 2\]"):
        bank_for(wider, [lora], where, **ON, known=bank)


@torch.no_grad()
def test_hooks_of_a_module_get_its_output_with_the_loras() -> None:
    model, lora, x, run = group()
    expected = [model[name](x) + x @ lora[name].delta().t() for name in model]
    seen: list[Tensor] = []

    def look(module: nn.Module, inputs: Any, output: Tensor) -> None:
        seen.append(output)

    where = {name: Site("text") for name in model}
    with installed_layers(model, [lora], where, **ON, how="forward") as there:
        there.use(there.inputs(constant_gates((1.0,))[0]))
        hook = model["v"].register_forward_hook(look)
        found = run()
        hook.remove()
    for one, other in zip([*found, *seen], [*expected, expected[1]], strict=True):
        torch.testing.assert_close(one, other)


@torch.no_grad()
def test_another_programs_forward_stays_and_calls_are_passed_on_once_the_loras_are_out() -> None:
    model, lora, x, run = group()
    base = run()
    layer: Any = model["k"]
    where = {name: Site("text") for name in model}
    with installed_layers(model, [lora], where, **ON, how="forward") as there:
        there.use(there.inputs(constant_gates((1.0,))[0]))
        ours = layer.forward
        layer.forward = lambda x: 2 * ours(x)  # and it is taken out after ours
        torch.testing.assert_close(run()[0], 2 * (base[0] + x @ lora["k"].delta().t()))
    torch.testing.assert_close(run(), [2 * base[0], base[1]])
    layer.forward = ours  # what the other program has found
    assert torch.equal(run()[0], base[0])
    with installed_layers(model, [lora], where, **ON, how="forward") as there:
        there.use(there.inputs(constant_gates((1.0,))[0]))
        torch.testing.assert_close(run()[0], base[0] + x @ lora["k"].delta().t())
    assert torch.equal(run()[0], base[0])


@torch.no_grad()
def test_a_forward_that_was_an_attribute_before_comes_back() -> None:
    model, lora, x, run = group()
    layer: Any = model["k"]
    layer.forward = own = lambda x: nn.Linear.forward(layer, 3 * x)
    before, base = Snapshot(model), run()
    with installed_layers(model, [lora], {name: Site("text") for name in model}, **ON, how="forward") as there:
        there.use(there.inputs(constant_gates((1.0,))[0]))
        torch.testing.assert_close(run()[0], base[0] + x @ lora["k"].delta().t())
    before.assert_unchanged(model)
    assert layer.forward is own


@torch.no_grad()
def test_deltas_are_added_to_an_output_that_is_given() -> None:
    model, lora, x, _ = group()
    with installed_layers(model, [lora], {name: Site("text") for name in model}, **ON) as there:
        there.use(there.inputs(constant_gates((1.0,))[0]))
        layer, output = there.bank["k"], torch.ones(1, 5, 4)
        expected = output + x @ lora["k"].delta().t()
        turned = output.transpose(0, 2).contiguous().transpose(0, 2)
        assert not turned.is_contiguous()
        for given in (output.clone(), turned):
            torch.testing.assert_close(layer.add(given, x), expected)
        assert torch.equal(layer(x), layer.add(layer.base(x), x))


def test_folding_on_forward_and_another_word_are_refused() -> None:
    unet = tiny_unet()
    before, wrong = Snapshot(unet), "hook"
    with installed(unet, [random_lora(unet, 1)], how="forward") as installation:
        during = Snapshot(unet)
        with pytest.raises(ValueError, match="not folded into weights; install them with how='module'"):
            installation.fold(["text"], (1.0,))
        during.assert_unchanged(unet)
    with pytest.raises(ValueError, match="how is 'hook'; expected 'module' or 'forward'"), installed(unet, how=wrong):  # pyright: ignore[reportArgumentType]
        pass
    before.assert_unchanged(unet)
