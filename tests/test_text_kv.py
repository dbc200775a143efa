"""Keys and values of the text: masked by token, projected once, and never stale."""

import weakref
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from components import EVERYTHING, random_lora, sd_unet, sdxl_unet, unet_inputs
from lora_compose.attention import Gates, Lora, attention_layers, install
from reference import dense, random_gates, relative_error

FP32: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
GRID, TOKENS = (8, 8), 7


def small_sdxl() -> Any:
    return sdxl_unet(transformer_layers_per_block=(1, 1, 2), layers_per_block=1)


def two_loras(unet: Any) -> list[Lora]:
    return [random_lora(unet, seed, rank=1 + seed, scale=0.5, size=0.2, targets=EVERYTHING) for seed in (1, 2)]


def text_layers(unet: Any) -> list[str]:
    return [f"{layer.name}.{side}" for layer in attention_layers(unet) if layer.cross for side in ("to_k", "to_v")]


def gates_with(text: Tensor) -> Gates:
    """Token gates as given, all other layers at full strength."""
    one = torch.ones(1, 1, text.shape[-1])
    return Gates(text, dict.fromkeys(range(4), one), one[0], GRID)


class Calls:
    """Counts the calls of layers and keeps their outputs."""

    def __init__(self, unet: Any, names: list[str]) -> None:
        self.count: Counter[str] = Counter()
        self.handles = [unet.get_submodule(name).register_forward_hook(self._hook(name)) for name in names]

    def _hook(self, name: str) -> Any:
        def hook(*_: Any) -> None:
            self.count[name] += 1

        return hook

    def take(self) -> dict[str, int]:
        count, self.count = dict(self.count), Counter()
        return count


@pytest.mark.parametrize("family", [sd_unet, small_sdxl])
@torch.no_grad()
def test_tokens_outside_the_mask_keep_the_bits_of_the_base(family: Any) -> None:
    unet = family()
    text = torch.randn(3, TOKENS, 24, generator=torch.Generator().manual_seed(0))
    loras = two_loras(unet)
    mask = torch.zeros(3, TOKENS, 2)
    mask[1, 2:4, 0] = 1  # the first concept stands at tokens 2 and 3 of row 1
    mask[1, 5, 1] = 1
    mask[2, 6, 1] = 0.5
    base = {name: unet.get_submodule(name)(text) for name in text_layers(unet)}
    with install(unet, loras, **FP32) as installation:
        installation.use(gates_with(mask))
        found = {name: unet.get_submodule(name)(text) for name in text_layers(unet)}
    touched = mask.sum(dim=2) > 0
    for name, plain in base.items():
        assert torch.equal(found[name][~touched], plain[~touched]), name
        expected = plain.clone()
        expected[1, 2:4] += F.linear(text[1, 2:4], dense(loras[0][name]))
        expected[1, 5] += F.linear(text[1, 5], dense(loras[1][name]))
        expected[2, 6] += 0.5 * F.linear(text[2, 6], dense(loras[1][name]))
        assert relative_error(found[name][touched], expected[touched]) < 1e-6, name
        assert relative_error(plain[touched], expected[touched]) > 0.05, name


@torch.no_grad()
def test_a_mask_of_zeros_on_text_and_image_is_exactly_the_base() -> None:
    unet = sd_unet()
    inputs = unet_inputs(unet, grid=GRID, tokens=TOKENS)
    zero = torch.zeros(1, 1, 2)
    with install(unet, two_loras(unet), **FP32) as installation:
        installation.use(Gates(zero, dict.fromkeys(range(4), zero), zero[0], GRID), inputs["encoder_hidden_states"])
        silent = unet(**inputs)[0]
        installation.use(gates_with(torch.zeros(2, TOKENS, 2)), inputs["encoder_hidden_states"])
        leaking = unet(**inputs)[0]
    assert torch.equal(silent, unet(**inputs)[0])
    assert relative_error(leaking, silent) > 0.1, "layers without a token mask act all the same"


@pytest.mark.parametrize("adapted", [True, False])
@torch.no_grad()
def test_each_projection_runs_once_for_many_passes_and_keeps_its_bits(adapted: bool) -> None:
    unet = sd_unet()
    inputs = [unet_inputs(unet, grid=GRID, tokens=TOKENS, seed=seed) for seed in range(3)]
    text = inputs[0]["encoder_hidden_states"]
    for one in inputs:
        one["encoder_hidden_states"] = text
    gates, _ = random_gates("everything", rows=2, tokens=TOKENS, concepts=2, latent_grid=GRID)
    calls = Calls(unet, text_layers(unet))
    with install(unet, two_loras(unet) if adapted else [], **FP32) as installation:
        if not adapted:
            gates = gates_with(torch.ones(1, 1, 0))
        fresh = []
        for one in inputs:
            installation.use(gates)  # no text: nothing is kept
            fresh.append(unet(**one)[0])
        assert calls.take() == dict.fromkeys(text_layers(unet), 3)
        kept = []
        for one in inputs:
            installation.use(gates, text)
            kept.append(unet(**one)[0])
        assert calls.take() == dict.fromkeys(text_layers(unet), 1)
    assert all(torch.equal(a, b) for a, b in zip(kept, fresh, strict=True))


@torch.no_grad()
def test_kept_keys_and_values_are_renewed_for_a_new_text_and_new_text_gates_only() -> None:
    unet = sd_unet()
    first, second = (unet_inputs(unet, grid=GRID, tokens=TOKENS, seed=seed) for seed in range(2))
    gates, _ = random_gates("everything", rows=2, tokens=TOKENS, concepts=2, latent_grid=GRID, seed=1)
    other, _ = random_gates("everything", rows=2, tokens=TOKENS, concepts=2, latent_grid=GRID, seed=2)
    other_image = Gates(gates.text, other.image, gates.row, GRID)
    calls = Calls(unet, text_layers(unet))
    once = dict.fromkeys(text_layers(unet), 1)

    loras, untouched = two_loras(unet), sd_unet()

    def fresh(gates: Gates, inputs: dict[str, Any]) -> Tensor:
        with install(untouched, loras, **FP32) as installation:
            installation.use(gates)
            return untouched(**inputs)[0]

    with install(unet, loras, **FP32) as installation:
        for use, inputs, renewed in (
            (gates, first, once),
            (gates, second, once),  # new text
            (other, second, once),  # new gates
            (other, second, {}),
            (gates, first, {}),  # both are still there
            (other_image, first, {}),  # the text gates are the same
            (gates, first, {}),
        ):
            installation.use(use, inputs["encoder_hidden_states"])
            assert torch.equal(unet(**inputs)[0], fresh(use, inputs))
            assert calls.take() == renewed


def test_gates_that_alternate_are_expanded_once() -> None:
    unet = sd_unet()
    one, other = (
        random_gates("everything", rows=2, tokens=TOKENS, concepts=2, latent_grid=GRID, seed=seed)[0] for seed in (1, 2)
    )
    with install(unet, two_loras(unet), **FP32) as installation:
        expanded = []
        for gates in (one, other, one, other):
            installation.use(gates)
            expanded.append(installation.slot.gates)
    assert expanded[0] is expanded[2] is not expanded[1]
    assert expanded[1] is expanded[3]


@pytest.mark.parametrize("gone", ["text", "gates"])
@torch.no_grad()
def test_kept_keys_and_values_go_with_their_text_and_with_their_gates(gone: str) -> None:
    unet = sd_unet()
    first, second = (unet_inputs(unet, grid=GRID, tokens=TOKENS, seed=seed) for seed in range(2))
    gates, other = (
        random_gates("everything", rows=2, tokens=TOKENS, concepts=2, latent_grid=GRID, seed=seed)[0] for seed in (1, 2)
    )
    with install(unet, two_loras(unet), **FP32) as installation:
        installation.use(gates, first["encoder_hidden_states"])
        unet(**first)
        kept = weakref.ref(installation.slot.text_kv)
        installation.use(other, second["encoder_hidden_states"])
        assert kept() is not None
        if gone == "text":
            del first
        else:
            del gates
        assert kept() is None


@torch.no_grad()
def test_fewer_rows_of_the_same_text_are_projected_again() -> None:
    unet = sd_unet()
    inputs = unet_inputs(unet, grid=GRID, tokens=TOKENS)
    gates, _ = random_gates("everything", rows=2, tokens=TOKENS, concepts=2, latent_grid=GRID)
    with install(unet, two_loras(unet), **FP32) as installation:
        installation.use(gates, inputs["encoder_hidden_states"])
        whole = unet(**inputs)[0]
        part = inputs | {key: inputs[key][1:] for key in ("sample", "encoder_hidden_states")}
        installation.use(gates.select(slice(1, None)), part["encoder_hidden_states"])
        assert relative_error(unet(**part)[0], whole[1:]) < 1e-5


def test_latent_gradients_are_the_same_with_kept_keys_and_values() -> None:
    unet = sd_unet()
    inputs = unet_inputs(unet, grid=GRID, tokens=TOKENS)
    gates, _ = random_gates("everything", rows=2, tokens=TOKENS, concepts=2, latent_grid=GRID)
    gradients = []
    with install(unet, two_loras(unet), **FP32) as installation:
        for text in (None, inputs["encoder_hidden_states"], inputs["encoder_hidden_states"]):
            installation.use(gates, text)
            sample = inputs["sample"].clone().requires_grad_()
            gradients.append(torch.autograd.grad(unet(**{**inputs, "sample": sample})[0].square().sum(), sample)[0])
    assert gradients[0].abs().max() > 0
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


def test_nothing_flows_from_unmasked_tokens_through_the_lora_of_keys_and_values() -> None:
    unet = sd_unet().requires_grad_(False)
    loras = two_loras(unet)
    mask = torch.zeros(1, TOKENS, 2)
    mask[0, 3, 0] = 1
    name = text_layers(unet)[0]
    gradients = []
    for use in (None, mask):
        text = torch.randn(1, TOKENS, 24, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with install(unet, loras, **FP32) as installation:
            installation.use(gates_with(torch.zeros_like(mask) if use is None else use))
            out = unet.get_submodule(name)(text)
        weights = torch.linspace(-1, 1, out.numel()).view_as(out)
        gradients.append(torch.autograd.grad((out * weights).sum(), text)[0])
    changed = (gradients[0] != gradients[1]).any(dim=2)[0]
    assert changed.tolist() == [token == 3 for token in range(TOKENS)]
