"""The layers of a UNet: names, order, grids and sites are what a real pass shows."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn

from components import attention_layers, sd_unet, sdxl_unet, unet_inputs
from lora_compose.attention import Site, grid_at
from lora_compose.attention.backbones.unet import AttentionLayer, UNetBackbone, map_level
from lora_compose.compose.playground.assets import playground_model
from small_world import SIZE


def playground_unet() -> Any:
    config: Any = UNet2DConditionModel.load_config(str(playground_model() / "unet"))
    return UNet2DConditionModel.from_config(config)


def resnet_sampled_unet() -> UNet2DConditionModel:
    """Halves and doubles the grid inside residual blocks instead of by a convolution of its own."""
    return sd_unet(
        block_out_channels=(8, 16, 16),
        down_block_types=("CrossAttnDownBlock2D", "ResnetDownsampleBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "ResnetUpsampleBlock2D", "CrossAttnUpBlock2D"),
    )


UNETS: dict[str, Callable[[], Any]] = {
    "sd": sd_unet,
    "sdxl": sdxl_unet,
    "playground": playground_unet,
    "resnet-sampled": resnet_sampled_unet,
}
CASES = [*((name, (8, 24)) for name in UNETS), ("sd", (15, 9)), ("sdxl", (9, 14)), ("playground", (15, 9))]


def watch(unet: Any, modules: Mapping[str, nn.Module], grid: tuple[int, int]) -> dict[str, tuple[Any, Any, Any]]:
    """Runs the UNet and returns positional arguments, keyword arguments and output of modules, in calling order."""
    calls: dict[str, tuple[Any, Any, Any]] = {}

    def listen(name: str, module: nn.Module) -> None:
        def hook(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            assert name not in calls, f"{name} was called twice"
            calls[name] = args, kwargs, out

        module.register_forward_hook(hook, with_kwargs=True)

    for name, module in modules.items():
        listen(name, module)
    with torch.no_grad():
        unet(**unet_inputs(unet, grid=grid))
    return calls


@pytest.mark.parametrize("name", UNETS)
def test_attention_layers_are_named_in_the_order_of_a_real_pass(name: str) -> None:
    unet = UNETS[name]()
    modules = {n: m for n, m in unet.named_modules() if isinstance(m, Attention)}
    calls = watch(unet, modules, (16, 16))
    layers = attention_layers(unet)
    assert [layer.name for layer in layers] == list(calls)
    for layer in layers:
        _, kwargs, _ = calls[layer.name]
        assert layer.cross == (kwargs["encoder_hidden_states"] is not None), layer.name
        assert layer.stage == layer.name.split("_")[0]


def test_families_have_the_known_numbers_of_attention_layers() -> None:
    for unet, expected in ((sd_unet(), (32, 16)), (sdxl_unet(), (140, 70))):
        layers = attention_layers(unet)
        assert (len(layers), sum(layer.cross for layer in layers)) == expected


@pytest.mark.parametrize(("name", "grid"), CASES)
def test_grids_are_the_true_sizes_of_activations(name: str, grid: tuple[int, int]) -> None:
    unet = UNETS[name]()
    adaptable = {n: m for n, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d | Attention)}
    calls = watch(unet, adaptable, grid)
    assert calls.keys() == adaptable.keys()
    where, text_tokens = UNetBackbone(unet).sites, 7
    for layer in attention_layers(unet):
        height, width = grid_at(grid, layer.level)
        assert calls[layer.name][2].shape[1] == height * width, layer.name
    for module, (_, _, out) in calls.items():
        if isinstance(adaptable[module], Attention):
            continue
        site = where[module]
        if out.ndim == 4:
            assert (site.parts, tuple(out.shape[2:])) == (("image",), grid_at(grid, site.level)), module
        elif out.ndim == 2:
            assert site == Site("row"), module
        elif site.parts == ("text",):
            assert out.shape[1] == text_tokens, module
            assert module.endswith(("attn2.to_k", "attn2.to_v")), module
        else:
            height, width = grid_at(grid, site.level)
            assert site.parts == ("image",), module
            assert out.shape[1] == height * width, module
    keys_and_values = [m for m, site in where.items() if site.parts == ("text",)]
    assert len(keys_and_values) == 2 * sum(layer.cross for layer in attention_layers(unet))


@pytest.mark.parametrize("name", UNETS)
def test_every_linear_layer_and_convolution_has_a_site(name: str) -> None:
    unet = UNETS[name]()
    where = UNetBackbone(unet).sites
    for module_name, module in unet.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            assert module_name in where, module_name


def test_names_outside_the_unet_have_no_site() -> None:
    outside = {"", "down_blocks.4.resnets.0.conv1", "mid_block.attentions.1.proj_in", "encoder.conv_in", "to_q"}
    assert not outside & UNetBackbone(sd_unet()).sites.keys()


def test_map_grid_of_sd_and_sdxl_is_a_thirty_second_of_the_image() -> None:
    for unet in (sd_unet(), sdxl_unet()):
        # 1024 pixels are 128 latent cells
        level = map_level(attention_layers(unet))
        assert grid_at((128, 128), level) == (32, 32)


def test_map_grid_of_the_playground_is_the_coarser_of_its_two() -> None:
    latents, unet = SIZE // 8, playground_unet()
    assert grid_at((latents, latents), map_level(attention_layers(unet))) == (latents // 2, latents // 2)


def test_map_grid_needs_cross_attention_on_the_way_down_and_up() -> None:
    def layer(stage: Any, level: int, cross: bool = True) -> AttentionLayer:
        return AttentionLayer(f"{stage}.{level}", cross, stage, level)

    assert map_level((layer("down", 0), layer("down", 1), layer("mid", 2), layer("up", 1), layer("up", 0))) == 1
    assert map_level((layer("down", 0), layer("down", 1), layer("up", 1, cross=False), layer("up", 0))) == 0
    with pytest.raises(ValueError, match="no grid with cross-attention"):
        map_level((layer("down", 0), layer("mid", 1), layer("up", 1)))
    with pytest.raises(ValueError, match="no grid with cross-attention"):
        UNetBackbone(sd_unet(up_block_types=("UpBlock2D",) * 4)).map_level  # noqa: B018
