"""A UNet that stops early gives the same maps and gradients, and is whole again afterwards."""

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from components import attention_layers, installed, sd_unet, shallow_sdxl_unet, tiny_unet, unet_inputs
from lora_compose.attention import Recorder, frozen
from lora_compose.attention.backbones.unet import map_level, stopped_after
from reference import constant_gates, relative_error

ROWS, TOKENS, GRID = 2, 7, (8, 12)


FAMILIES = {"sd": sd_unet, "sdxl": shallow_sdxl_unet, "two levels": tiny_unet}
BLOCKS_KEPT = {"sd": 2, "sdxl": 1, "two levels": 2}


def map_layers(unet: nn.Module) -> list[str]:
    """Cross- and self-attention layers of the map grid."""
    layers = attention_layers(unet)
    return [layer.name for layer in layers if layer.level == map_level(layers)]


def stage_layers(unet: nn.Module, stage: str) -> list[str]:
    return [layer.name for layer in attention_layers(unet) if layer.stage == stage]


def maps_and_gradient(
    unet: Any, layers: Iterable[str], *, stop: bool, grid: tuple[int, int] = GRID
) -> tuple[dict[str, Tensor], Tensor]:
    """Recorded maps of one pass and the gradient of a loss on them, which is taken after the pass is over."""
    inputs = unet_inputs(unet, grid=grid, tokens=TOKENS)
    sample = inputs["sample"].requires_grad_()
    cross = {layer.name for layer in attention_layers(unet) if layer.cross}
    recorder = Recorder(cross & set(layers), torch.eye(TOKENS).expand(ROWS, -1, -1), set(layers) - cross)
    gates, _ = constant_gates([], rows=ROWS, tokens=TOKENS, latent_grid=grid)
    with installed(unet) as installation, frozen(unet):
        installation.use(installation.inputs(gates, inputs["encoder_hidden_states"]), recorder)
        with stopped_after(unet, layers) if stop else nullcontext():
            unet(**inputs)
        maps = recorder.maps | recorder.self_maps
        loss = torch.stack([found.square().sum() for found in maps.values()]).sum()
        (gradient,) = torch.autograd.grad(loss, sample)
    return {name: found.detach() for name, found in maps.items()}, gradient


@pytest.mark.parametrize(
    ("family", "stage", "grid"),
    [
        *((family, None, (9, 7)) for family in FAMILIES),
        *(("sd", stage, GRID) for stage in ("down", "mid")),
    ],
)
def test_maps_and_gradients_are_those_of_a_whole_pass(family: str, stage: str | None, grid: tuple[int, int]) -> None:
    """Of the layers on the map grid, or of those of one stage."""
    unet = FAMILIES[family]()
    layers = map_layers(unet) if stage is None else stage_layers(unet, stage)
    whole, gradient = maps_and_gradient(unet, layers, stop=False, grid=grid)
    stopped, same = maps_and_gradient(unet, layers, stop=True, grid=grid)
    assert whole.keys() == stopped.keys() == set(layers)
    assert all(torch.equal(stopped[name], whole[name]) for name in layers)
    assert gradient.abs().max() > 0
    assert torch.equal(same, gradient)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_same_with_gradient_checkpointing(family: str) -> None:
    unet = FAMILIES[family]()
    layers = map_layers(unet)
    maps, gradient = maps_and_gradient(unet, layers, stop=False)
    unet.enable_gradient_checkpointing()
    unet.train()  # nothing here drops out
    passes = []
    unet.down_blocks[0].resnets[0].register_forward_pre_hook(lambda *_: passes.append(1))
    again, same = maps_and_gradient(unet, layers, stop=True)
    assert len(passes) == 2, "the forward is to be entered again in backward"
    assert all(relative_error(again[name], maps[name]) < 1e-6 for name in layers)
    assert relative_error(same, gradient) < 1e-5


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_maps_and_gradient() -> None:
    unet = tiny_unet()
    layers = map_layers(unet)
    whole, gradient = maps_and_gradient(unet, layers, stop=False)
    unet.compile(backend="eager")
    for stop in (True, False, True):  # one graph must not serve the other
        maps, same = maps_and_gradient(unet, layers, stop=stop)
        assert all(relative_error(maps[name], whole[name]) < 1e-6 for name in layers)
        assert relative_error(same, gradient) < 1e-5


class ReachedError(Exception):
    pass


def refuse(*_: Any) -> None:
    raise ReachedError


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_runs_after_the_block_with_the_last_layer(family: str) -> None:
    unet = FAMILIES[family]()
    inputs, kept = unet_inputs(unet, grid=GRID), BLOCKS_KEPT[family]
    later = [*unet.up_blocks[kept:], *(unet.up_blocks[kept - 1].upsamplers or []), unet.conv_norm_out, unet.conv_out]
    for module in later:
        module.register_forward_pre_hook(refuse)
    with torch.no_grad(), stopped_after(unet, map_layers(unet)):
        assert len(unet.up_blocks) == kept
        unet(**inputs)
    with torch.no_grad(), pytest.raises(ReachedError):
        unet(**inputs)


@pytest.mark.parametrize("stage", ["down", "mid"])
def test_the_up_path_is_left_out_where_none_of_its_layers_is_wanted(stage: str) -> None:
    unet = sd_unet()
    for block in unet.up_blocks:
        block.register_forward_pre_hook(refuse)
    for layers in (stage_layers(unet, stage), []):
        with torch.no_grad(), stopped_after(unet, layers):
            assert len(unet.up_blocks) == 0
            unet(**unet_inputs(unet, grid=GRID))


def test_blocks_are_distinguished_by_their_whole_names() -> None:
    unet = nn.Module()
    unet.down_blocks, unet.up_blocks = nn.ModuleList(), nn.ModuleList(nn.Identity() for _ in range(12))
    unet.conv_norm_out = unet.conv_out = nn.Identity()
    with stopped_after(unet, ["up_blocks.1.attn"]):
        assert len(unet.up_blocks) == 2
    with stopped_after(unet, ["up_blocks.10.attn", "up_blocks.1.attn"]):
        assert len(unet.up_blocks) == 11


@pytest.mark.parametrize(("family", "fails"), [("sd", True), ("sdxl", False)])
def test_the_model_is_whole_again_afterwards(family: str, fails: bool) -> None:
    unet = FAMILIES[family]()
    modules, state = list(unet.named_modules()), unet.state_dict()
    pointers = {name: tensor.data_ptr() for name, tensor in state.items()}
    with torch.no_grad():
        expected = unet(**unet_inputs(unet, grid=GRID))[0]
    with pytest.raises(ReachedError) if fails else nullcontext(), stopped_after(unet, map_layers(unet)):
        assert list(unet.named_modules()) != modules
        if fails:
            raise ReachedError
    found = list(unet.named_modules())
    assert [name for name, _ in found] == [name for name, _ in modules]
    assert all(one is other for (_, one), (_, other) in zip(found, modules, strict=True))
    assert list(unet.state_dict()) == list(state)
    assert {name: tensor.data_ptr() for name, tensor in unet.state_dict().items()} == pointers
    with torch.no_grad():
        assert torch.equal(unet(**unet_inputs(unet, grid=GRID))[0], expected)


def test_a_model_without_a_last_norm_is_whole_again_too() -> None:
    unet = tiny_unet()
    del unet.conv_norm_out
    unet.conv_norm_out = None  # as diffusers builds it for models without group norm
    with torch.no_grad(), stopped_after(unet, stage_layers(unet, "down")):
        unet(**unet_inputs(unet, grid=GRID))
    assert unet.conv_norm_out is None


def test_the_model_inside_a_compiled_one_is_cut() -> None:
    unet = sd_unet()
    wrapper = nn.Module()
    wrapper._orig_mod = unet
    with stopped_after(wrapper, map_layers(unet)):
        assert len(unet.up_blocks) == BLOCKS_KEPT["sd"]
    assert len(unet.up_blocks) == 4


def test_what_is_cut_off_is_moved_with_the_model() -> None:
    """An offloaded model may be brought to its device inside the block, which does not happen again after it."""
    unet: Any = sd_unet()
    before = repr(unet)
    for layers in ([], map_layers(unet)):
        with stopped_after(unet, layers):
            unet.to(torch.float64)
        assert {parameter.dtype for parameter in unet.parameters()} == {torch.float64}
        assert repr(unet) == before
        unet.to(torch.float32)
