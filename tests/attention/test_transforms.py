"""DoRA and OFT behind gates equal dense weights: each row, token and cell gets a weight of its own, in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from gated_layers import (
    CPU,
    IN,
    KINDS,
    OUT,
    ROWS,
    SIDE,
    TOKENS,
    Kind,
    concept,
    error,
    gates_by,
    run,
)
from lora_compose.attention import BankCache, Gates, How, KeptBanks, Lora, LoraFactors, Site, installed_layers
from lora_compose.attention.transforms import Rescaling


class Quantised(nn.Linear):
    """Stands for the layers of quantisation libraries: integers in the weight's place, a product of its own."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features)
        step = layer.weight.detach().abs().amax() / 127
        self.weight = nn.Parameter((layer.weight / step).round().to(torch.int8), requires_grad=False)
        self.step, self.bias = step, layer.bias

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype) * self.step.to(input.dtype), self.bias)


def layer_of(name: str, base: str) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.Linear(IN, OUT) if name == "linear" else nn.Conv2d(IN, OUT, int(name[-1]), padding=int(name[-1]) // 2)
    layer = Quantised(layer) if base == "quantised" and isinstance(layer, nn.Linear) else layer
    return layer.to(torch.bfloat16 if base == "bf16" else torch.float32).requires_grad_(False)


def weight_of(layer: Any) -> Tensor:
    """Dequantised, in float64."""
    return layer.weight.double() * (layer.step.double() if isinstance(layer, Quantised) else 1)


def dense(layer: Any, x: Tensor, gates: Gates, changed: list[Tensor]) -> Tensor:
    """Every position has the weight W + sum of g (W' - W), in float64."""
    weight, x, bias = weight_of(layer), x.double(), layer.bias.double()
    change = torch.stack([one - weight for one in changed]).flatten(2)
    convolution = isinstance(layer, nn.Conv2d)
    gate = (gates.image[0] if convolution or x.shape[1] != TOKENS else gates.text).double()
    if not convolution:
        weights = weight + torch.einsum("rtc,coi->rtoi", gate, change)
        return torch.einsum("rtoi,rti->rto", weights.expand(*x.shape[:2], -1, -1), x) + bias
    patches = F.unfold(x, layer.kernel_size, padding=layer.kernel_size[0] // 2).mT
    weights = weight.flatten(1) + torch.einsum("rtc,coi->rtoi", gate, change)
    found = torch.einsum("rtoi,rti->rto", weights.expand(*patches.shape[:2], -1, -1), patches) + bias
    return found.mT.unflatten(-1, (SIDE, SIDE))


LAYERS: list[tuple[str, str]] = [("linear", gate) for gate in ("row", "token", "cell")]
LAYERS += [(name, gate) for name in ("conv1", "conv3") for gate in ("row", "cell")]
CASES: list[tuple[Kind, str, str, str]] = [
    (kind, name, gate, base)
    for kind in KINDS
    for name, gate in LAYERS
    for base in ("fp32", "bf16", "quantised")
    if name == "linear" or (kind != "LoKr with DoRA" and base != "quantised")  # there are none of these
]


@pytest.mark.parametrize(("kind", "name", "what", "base"), CASES)
def test_gated_transforms_equal_dense_weights(kind: Kind, name: str, what: str, base: str) -> None:
    layer: Any = layer_of(name, base)
    shape = (ROWS, TOKENS if what == "token" else SIDE * SIDE, IN) if name == "linear" else (ROWS, IN, SIDE, SIDE)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(layer.bias.dtype)
    order: tuple[Kind | None, ...] = (kind, None, kind)
    concepts = [concept(one, weight_of(layer), seed) for seed, one in enumerate(order)]
    gates = gates_by(what, len(concepts))
    expected = dense(layer, x, gates, [changed for _, changed in concepts])
    found = run(layer, [factors for factors, _ in concepts], gates, x)
    plain = layer(x)
    assert error(plain, expected) > 0.3, "the concepts are to have an effect"
    assert error(found, expected) < (2e-2 if base == "bf16" else 2e-6)
    torch.testing.assert_close(found[: ROWS // 2], plain[: ROWS // 2], rtol=0, atol=0)  # unconditional rows


@pytest.mark.parametrize("how", ["module", "forward"])
@pytest.mark.parametrize("name", ["linear", "conv3"])
def test_all_kinds_together_are_each_relative_to_the_base_weight(name: str, how: How) -> None:
    layer: Any = layer_of(name, "fp32")
    x = torch.randn((ROWS, SIDE * SIDE, IN) if name == "linear" else (ROWS, IN, SIDE, SIDE))
    kinds: list[Kind | None] = [kind for kind in KINDS if name == "linear" or kind != "LoKr with DoRA"]
    concepts = [concept(kind, weight_of(layer), seed) for seed, kind in enumerate((*kinds, None))]
    gates = gates_by("cell", len(concepts))
    expected = dense(layer, x, gates, [changed for _, changed in concepts])
    assert error(run(layer, [factors for factors, _ in concepts], gates, x, how), expected) < 2e-6


@pytest.mark.parametrize(
    ("kind", "name"), [(k, n) for k in KINDS for n in ("linear", "conv3") if n == "linear" or k != "LoKr with DoRA"]
)
def test_constant_gates_are_folded_into_the_weight(kind: Kind, name: str) -> None:
    layer: Any = layer_of(name, "fp32")
    before = layer.weight.clone()
    order: tuple[Kind | None, ...] = (kind, None, kind)
    concepts = [concept(one, weight_of(layer), seed) for seed, one in enumerate(order)]
    model, weights = nn.ModuleDict({"layer": layer}), [0.7, -0.4, 0.3]
    loras: list[Lora] = [{"layer": factors} for factors, _ in concepts]
    with installed_layers(model, loras, {"layer": Site("image")}, device=CPU, dtype=torch.float32) as there:
        assert there.fold(["image"], weights) == 1
        pairs = zip(weights, concepts, strict=True)
        expected = weight_of(layer) * 0 + before + sum(gate * (one - before) for gate, (_, one) in pairs)
        assert error(layer.weight, expected) < 1e-6
    torch.testing.assert_close(layer.weight, before, rtol=0, atol=0)


def test_another_adapter_in_the_layer_is_not_rescaled() -> None:
    layer: Any = layer_of("linear", "fp32")
    factors, changed = concept("DoRA", weight_of(layer), 0)
    model = nn.ModuleDict({"layer": layer})
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False), model)
    x, gates = torch.randn(ROWS, SIDE * SIDE, IN), gates_by("cell", 1)
    with torch.no_grad():
        other = model["layer"](x) - layer(x)
    found = run(model["layer"], [factors], gates, x)
    assert error(found, dense(layer, x, gates, [changed]) + other) < 2e-6


def fused(layer: Any) -> None:
    layer.weight.data += torch.randn(OUT, 1) @ torch.randn(1, IN)  # as PEFT fuses LoRAs; PyTorch counts no change


def changed_in_place(layer: Any) -> None:
    layer.weight[3] = 0


def replaced(layer: Any) -> None:
    layer.weight = nn.Parameter(layer.weight * 2 + 0.1, requires_grad=False)


@pytest.mark.parametrize("change", [fused, changed_in_place, replaced])
def test_a_kept_bank_is_made_again_for_another_weight(change: Callable[[Any], None]) -> None:
    layer: Any = layer_of("linear", "fp32")
    factors, changed = concept("DoRA", weight_of(layer), 0)
    x, gates, cache = torch.randn(ROWS, SIDE * SIDE, IN), gates_by("cell", 1), BankCache(1 << 20)
    kept = KeptBanks(cache, (("cat",),))
    assert error(run(layer, [factors], gates, x, kept=kept), dense(layer, x, gates, [changed])) < 2e-6
    (bank,) = cache._banks.values()
    run(layer, [factors], gates, x, kept=kept)
    assert [*cache._banks.values()] == [bank]
    change(layer)
    _, changed = concept("DoRA", weight_of(layer), 0)
    assert error(run(layer, [factors], gates, x, kept=kept), dense(layer, x, gates, [changed])) < 2e-6


def test_a_row_of_zeros_stays_one() -> None:
    layer: Any = layer_of("linear", "fp32")
    layer.weight[3] = 0
    factors = LoraFactors(torch.empty(0, IN), torch.empty(OUT, 0), transform=Rescaling(torch.ones(OUT)))
    found = run(layer, [factors], gates_by("row", 1), x := torch.randn(ROWS, SIDE * SIDE, IN))
    torch.testing.assert_close(found[..., 3], layer(x)[..., 3])


def test_absurd_factors_are_refused_with_the_layer() -> None:
    layer: Any = layer_of("linear", "fp32")
    factors = LoraFactors(torch.empty(0, IN), torch.empty(OUT, 0), transform=Rescaling(torch.full((OUT,), 1e6)))
    with pytest.raises(
        ValueError, match=r"^layer: the model's weight would be multiplied by .*; expected at most 1000"
    ):
        run(layer, [factors], gates_by("row", 1), torch.randn(ROWS, SIDE * SIDE, IN))
