"""Keys and values of the text: masked by token, and projected once for all passes with the same inputs."""

import weakref
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from components import EVERYTHING, installed, random_lora, shallow_sdxl_unet, tiny_unet, unet_inputs, with_bank
from lora_compose.attention import Gates, Lora
from lora_compose.attention.backbones.unet import UNetBackbone
from reference import dense, random_gates, relative_error

GRID, TOKENS = (8, 8), 7


def two_loras(unet: Any) -> list[Lora]:
    return [random_lora(unet, seed, rank=1 + seed, scale=0.5, size=0.2, targets=EVERYTHING) for seed in (1, 2)]


def text_layers(unet: Any) -> list[str]:
    """The projections to keys and values of cross-attention."""
    return [name for name, site in UNetBackbone(unet).sites.items() if site.parts == ("text",)]


def random_gates_of(seed: int = 0) -> Gates:
    return random_gates("everything", rows=2, tokens=TOKENS, concepts=2, latent_grid=GRID, seed=seed)[0]


def gates_with(text: Tensor) -> Gates:
    """Token gates as given, all other layers at full strength."""
    one = torch.ones(1, 1, text.shape[-1])
    return Gates(text, dict.fromkeys(range(4), one), one[0], GRID)


class Calls:
    """Counts the calls of the projections of a UNet."""

    def __init__(self, unet: Any) -> None:
        self.count: Counter[str] = Counter()
        for name in text_layers(unet):
            unet.get_submodule(name).register_forward_hook(lambda *_, name=name: self.count.update([name]))

    def take(self) -> dict[str, int]:
        count, self.count = dict(self.count), Counter()
        return count


@pytest.mark.parametrize("family", [tiny_unet, shallow_sdxl_unet])
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
    with installed(unet, loras) as installation:
        installation.use(installation.inputs(gates_with(mask)))
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
    unet = tiny_unet()
    inputs = unet_inputs(unet, grid=GRID, tokens=TOKENS)
    zero, loras = torch.zeros(1, 1, 2), two_loras(unet)
    silent = with_bank(unet, loras, Gates(zero, dict.fromkeys(range(4), zero), zero[0], GRID), inputs)
    leaking = with_bank(unet, loras, gates_with(torch.zeros(2, TOKENS, 2)), inputs)
    assert torch.equal(silent, unet(**inputs)[0])
    assert relative_error(leaking, silent) > 0.1, "layers without a token mask act all the same"


@pytest.mark.parametrize("adapted", [True, False])
@torch.no_grad()
def test_each_projection_runs_once_for_many_passes_and_keeps_its_bits(adapted: bool) -> None:
    unet = tiny_unet()
    given = [unet_inputs(unet, grid=GRID, tokens=TOKENS, seed=seed) for seed in range(3)]
    text = given[0]["encoder_hidden_states"]
    given = [{**one, "encoder_hidden_states": text} for one in given]
    gates = random_gates_of() if adapted else gates_with(torch.ones(1, 1, 0))
    calls, outputs = Calls(unet), []
    with installed(unet, two_loras(unet) if adapted else []) as installation:
        for told, times in ((None, 3), (text, 1)):  # without a text nothing is kept
            inputs = installation.inputs(gates, told)
            for one in given:
                installation.use(inputs)
                outputs.append(unet(**one)[0])
            assert calls.take() == dict.fromkeys(text_layers(unet), times)
    assert all(torch.equal(kept, fresh) for kept, fresh in zip(outputs[3:], outputs[:3], strict=True))


@torch.no_grad()
def test_inputs_that_alternate_keep_keys_and_values_of_their_own_unless_they_share_them() -> None:
    unet, untouched = tiny_unet(), tiny_unet()
    first, second = (unet_inputs(unet, grid=GRID, tokens=TOKENS, seed=seed) for seed in range(2))
    gates, other = random_gates_of(1), random_gates_of(2)
    other_image = Gates(gates.text, other.image, gates.row, GRID)
    loras, calls = two_loras(unet), Calls(unet)
    once = dict.fromkeys(text_layers(unet), 1)
    with installed(unet, loras) as installation:
        one, two, three = (
            installation.inputs(use, given["encoder_hidden_states"])
            for use, given in ((gates, first), (gates, second), (other, second))
        )
        four = installation.inputs(other_image, first["encoder_hidden_states"], text_kv=one.text_kv)
        for inputs, use, given, projected in (
            (one, gates, first, once),
            (two, gates, second, once),  # another text
            (three, other, second, once),  # other text gates
            (three, other, second, {}),
            (one, gates, first, {}),
            (four, other_image, first, {}),  # the same text under the same text gates
            (one, gates, first, {}),
        ):
            installation.use(inputs)
            assert torch.equal(unet(**given)[0], with_bank(untouched, loras, use, given))
            assert calls.take() == projected


@torch.no_grad()
def test_kept_keys_and_values_go_with_their_inputs() -> None:
    unet = tiny_unet()
    given = unet_inputs(unet, grid=GRID, tokens=TOKENS)
    with installed(unet, two_loras(unet)) as installation:
        inputs = installation.inputs(random_gates_of(), given["encoder_hidden_states"])
        installation.use(inputs)
        unet(**given)
        kept = weakref.ref(inputs.text_kv)
        del inputs
        assert kept() is not None
        installation.use(installation.inputs(random_gates_of(), given["encoder_hidden_states"]))
        assert kept() is None


@torch.no_grad()
def test_fewer_rows_of_the_same_text_are_projected_again() -> None:
    unet = tiny_unet()
    inputs = unet_inputs(unet, grid=GRID, tokens=TOKENS)
    gates = random_gates_of()
    with installed(unet, two_loras(unet)) as installation:
        installation.use(installation.inputs(gates, inputs["encoder_hidden_states"]))
        whole = unet(**inputs)[0]
        part = inputs | {key: inputs[key][1:] for key in ("sample", "encoder_hidden_states")}
        installation.use(installation.inputs(gates.select(slice(1, None)), part["encoder_hidden_states"]))
        assert relative_error(unet(**part)[0], whole[1:]) < 1e-5


def test_latent_gradients_are_the_same_with_kept_keys_and_values() -> None:
    unet = tiny_unet()
    given = unet_inputs(unet, grid=GRID, tokens=TOKENS)
    gradients = []
    with installed(unet, two_loras(unet)) as installation:
        fresh = installation.inputs(random_gates_of())
        kept = installation.inputs(random_gates_of(), given["encoder_hidden_states"])
        for inputs in (fresh, kept, kept):
            installation.use(inputs)
            sample = given["sample"].clone().requires_grad_()
            gradients.append(torch.autograd.grad(unet(**{**given, "sample": sample})[0].square().sum(), sample)[0])
    assert gradients[0].abs().max() > 0
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])
