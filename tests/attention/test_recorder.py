"""Recorded maps are the attention that cells really pay to tokens."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from components import attention_layers, installed, random_lora, sd_unet, shallow_sdxl_unet, unet_inputs
from lora_compose.attention import Gates, Lora, Recorder
from lora_compose.attention.backbones.unet import UNetBackbone
from lora_compose.compose.benchmark.memory import added_memory
from reference import random_gates, relative_error

ROWS, TOKENS = 2, 7


def gates_for(concepts: int, grid: tuple[int, int] = (16, 16)) -> Gates:
    style = "everything" if concepts else "constant"
    return random_gates(style, rows=ROWS, tokens=TOKENS, concepts=concepts, latent_grid=grid)[0]


def cross_layers(unet: Any) -> list[str]:
    return [layer.name for layer in attention_layers(unet) if layer.cross]


def record(
    unet: Any,
    recorder: Recorder,
    *passes: dict[str, Any],
    gates: Gates | None = None,
    loras: Sequence[Lora] = (),
    dtype: torch.dtype = torch.float32,
) -> None:
    """Runs passes one after the other, each of them recorded."""
    with installed(unet, loras, dtype=dtype) as installation:
        for given in passes:
            inputs = installation.inputs(gates or gates_for(0), given["encoder_hidden_states"])
            installation.use(inputs, recorder)
            unet(**given)


def every_token(dtype: torch.dtype = torch.float32) -> Tensor:
    """A map of every token."""
    return torch.eye(TOKENS, dtype=dtype).expand(ROWS, -1, -1)


def softmax_by_hand(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """Attention of every head in double precision. Shape: [rows, heads, cells, tokens]."""
    rows, cells, channels = query.shape
    width = channels // heads
    probabilities = torch.empty(rows, heads, cells, key.shape[1], dtype=torch.float64)
    for row in range(rows):
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            scores = query[row, :, part].double() @ key[row, :, part].double().T / math.sqrt(width)
            powers = torch.exp(scores - scores.max(dim=1, keepdim=True).values)
            probabilities[row, head] = powers / powers.sum(dim=1, keepdim=True)
    return probabilities


@pytest.mark.parametrize("family", [sd_unet, shallow_sdxl_unet])
@torch.no_grad()
def test_maps_equal_the_softmax_of_the_true_queries_and_keys(family: Any) -> None:
    unet = family()
    inputs = unet_inputs(unet, grid=(8, 16), rows=ROWS, tokens=TOKENS)
    loras = [random_lora(unet, seed, size=0.2) for seed in range(2)]
    gates = gates_for(2, (8, 16))
    layers = cross_layers(unet)
    token_weights = torch.zeros(ROWS, TOKENS, 3)
    token_weights[0, 1, 0] = 1.0  # one token of row 0
    token_weights[1, 4, 0] = 1.0  # another one of row 1
    token_weights[:, 2:5, 1] = 1 / 3  # the mean of three
    seen: dict[str, Tensor] = {}

    def listen(name: str) -> None:
        def hook(_: Any, __: Any, out: Tensor) -> None:
            seen[name] = out.clone()

        unet.get_submodule(name).register_forward_hook(hook)

    recorder = Recorder(layers, token_weights)
    with installed(unet, loras) as installation:
        for layer in layers:
            listen(f"{layer}.to_q")
        installation.use(installation.inputs(gates, inputs["encoder_hidden_states"]), recorder)
        unet(**inputs)
        keys = {layer: unet.get_submodule(f"{layer}.to_k")(inputs["encoder_hidden_states"]) for layer in layers}
    assert list(recorder.maps) == layers
    for layer in layers:
        heads = unet.get_submodule(layer).heads
        attention = softmax_by_hand(seen[f"{layer}.to_q"], keys[layer], heads).mean(dim=1)
        found = recorder.maps[layer]
        assert found.dtype == torch.float32
        expected = torch.stack(
            [torch.stack([attention[0, :, 1], attention[1, :, 4]]), attention[:, :, 2:5].mean(dim=2)], dim=-1
        )
        assert relative_error(found[..., :2].double(), expected) < 1e-5, layer
        assert found[..., 2].abs().max() == 0
    spread = max(recorder.maps[layer][..., 0].std() for layer in layers)
    assert spread > 0.005, "the attention is to differ between cells"


@torch.no_grad()
def test_only_the_chosen_layers_and_passes_are_recorded_and_the_output_is_the_same() -> None:
    unet = sd_unet()
    inputs = unet_inputs(unet, tokens=TOKENS)
    chosen = UNetBackbone(unet).map_layers
    gates = gates_for(1)
    recorder = Recorder(chosen, torch.rand(ROWS, TOKENS, 2))
    text = inputs["encoder_hidden_states"]
    with installed(unet, [random_lora(unet, 1)]) as installation:
        installation.use(installation.inputs(gates, text))
        silent = unet(**inputs)[0]
        assert recorder.maps == {}
        installation.use(installation.inputs(gates, text), recorder)
        assert torch.equal(unet(**inputs)[0], silent)
        assert list(recorder.maps) == [*chosen]
        assert len(chosen) == 5
        first = dict(recorder.maps)
        installation.use(installation.inputs(gates, text))
        unet(**(inputs | {"sample": -inputs["sample"]}))
        assert recorder.maps == first
    average = recorder.mean()
    assert average.shape == (ROWS, 4 * 4, 2)
    torch.testing.assert_close(average, sum(recorder.maps.values()) / len(chosen))  # pyright: ignore[reportArgumentType]


@torch.no_grad()
def test_the_output_of_a_layer_is_that_of_its_projection_of_all_rows() -> None:
    unet = sd_unet()
    inputs, layer, seen = unet_inputs(unet, tokens=TOKENS), "up_blocks.1.attentions.2.transformer_blocks.0.attn1", []
    project = unet.get_submodule(f"{layer}.to_out.0")
    project.register_forward_hook(lambda _, __, out: seen.append(out))
    recorder = Recorder(cross_layers(unet)[:1], every_token(), output_layer=layer)
    assert recorder.all_layers == {cross_layers(unet)[0], layer}
    record(unet, recorder, inputs, inputs | {"sample": -inputs["sample"]})
    assert recorder.output is not None
    assert torch.equal(recorder.output, seen[1])
    parts = [recorder.of_rows(slice(row, row + 1)) for row in range(ROWS)]
    for row, part in enumerate(parts):
        part.take_output(layer, seen[1][row : row + 1])
        part.take_output("another layer", seen[0])
    recorder.join(parts, [len(part.token_weights) for part in parts])
    assert torch.equal(recorder.output, seen[1])


@torch.no_grad()
def test_a_second_pass_replaces_the_maps() -> None:
    unet = sd_unet()
    first, second = (unet_inputs(unet, tokens=TOKENS, seed=seed) for seed in range(2))

    def maps(*passes: dict[str, Any]) -> Tensor:
        recorder = Recorder(cross_layers(unet)[:1], every_token())
        record(unet, recorder, *passes)
        return recorder.mean()

    assert torch.equal(maps(first, second), maps(second))
    assert not torch.equal(maps(first), maps(second))


@torch.no_grad()
def test_half_precision_models_give_maps_in_single_precision() -> None:
    maps, dtype = [], torch.bfloat16
    for kind in (torch.float32, dtype):
        unet: Any = sd_unet()
        given = unet_inputs(unet.to(kind), tokens=TOKENS)
        given |= {key: given[key].to(kind) for key in ("sample", "encoder_hidden_states")}
        recorder = Recorder(cross_layers(unet)[:1], every_token(kind))
        record(unet, recorder, given, dtype=kind)
        maps.append(recorder.mean())
    assert maps[1].dtype == torch.float32
    torch.testing.assert_close(maps[1].sum(dim=2), torch.ones(ROWS, 256))
    torch.testing.assert_close(maps[1], maps[0], atol=2e-3, rtol=0)


def test_gradients_through_maps_are_the_same_with_gradient_checkpointing() -> None:
    found = []
    for checkpointing in (False, True):
        unet = sd_unet()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        inputs = unet_inputs(unet, grid=(8, 8), tokens=TOKENS)
        chosen = UNetBackbone(unet).map_layers
        gates = gates_for(1, (8, 8))
        recorder = Recorder(chosen, every_token())
        sample = inputs["sample"].requires_grad_()
        with installed(unet, [random_lora(unet, 1)]) as installation:
            installation.use(installation.inputs(gates, inputs["encoder_hidden_states"]), recorder)
            unet(**inputs)
            loss, maps = recorder.mean().square().sum(), dict(recorder.maps)
            found.append(torch.autograd.grad(loss, sample)[0])
            assert recorder.maps == maps  # not those of the recomputation, whose graph would live on with them
    assert found[0].abs().max() > 0
    assert torch.equal(found[0], found[1])


def test_token_weights_of_fewer_texts_is_for_the_last_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    query, keys = (torch.randn(*shape, generator=generator) for shape in ((ROWS, 2, 6, 4), (3, ROWS, 2, TOKENS, 4)))
    token_weights = torch.rand(3, ROWS, TOKENS, 2, generator=generator)
    every, last = Recorder(["layer"], token_weights), Recorder(["layer"], token_weights[1:])
    for recorder in (every, last):
        recorder.take("layer", query, keys, 0.5, several_texts=True)
    assert torch.equal(last.mean(), every.mean()[1:])


@pytest.mark.parametrize("several_texts", [False, True])
@pytest.mark.parametrize("of_mask", [None, 1, 5])
def test_heads_one_after_the_other_give_the_maps_of_all_at_once(
    several_texts: bool, of_mask: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With masks for all heads, and for each."""
    generator, texts = torch.Generator().manual_seed(0), [3] if several_texts else []
    query, key = (torch.randn(*shape, 4, generator=generator) for shape in ((ROWS, 5, 6), (*texts, ROWS, 5, TOKENS)))
    token_weights = torch.rand(*texts, ROWS, TOKENS, 2, generator=generator)
    given: dict[str, Any] = {"several_texts": several_texts}
    if of_mask is not None:
        given["bias"] = torch.randn(ROWS, of_mask, 6, TOKENS, generator=generator)
        given["allowed"] = torch.rand(1, of_mask, 6, TOKENS, generator=generator) < 0.8
        given["allowed"][..., 0] = True
    maps = []
    for heads in (5, 2, 1):
        monkeypatch.setattr("lora_compose.attention.recorder._AT_ONCE", heads * key[..., 0, :, 0].numel() * 6 * 4)
        recording = Recorder(["layer"], token_weights)
        recording.take("layer", query, key, 0.5, **given)
        maps.append(recording.mean())
    assert all(torch.allclose(other, maps[0], atol=1e-6) for other in maps[1:])


def test_recording_a_large_sequence_needs_a_few_times_the_scores_of_one_head() -> None:
    """FLUX.1 at 1024 x 1024, of tensors without numbers."""
    heads, cells, positions = 24, 4096, 4608
    query, key = (torch.empty(1, heads, n, 128, dtype=torch.bfloat16, device="meta") for n in (cells, positions))
    recording = Recorder(["layer"], torch.empty(1, 512, 2, device="meta"))
    with added_memory("meta") as memory:
        recording.take("layer", query, key, 0.1)
    assert recording.maps["layer"].shape == (1, cells, 2)
    assert memory.peak_bytes < 6 * cells * positions * 4
