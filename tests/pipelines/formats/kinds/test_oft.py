"""OFT files are what PEFT makes of them, and what the formulas of kohya and LyCORIS say."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import OFTConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file

from components import tiny_pipeline, tiny_unet, unet_inputs, with_bank
from flux import flux_transformer
from layouts import file_of
from lora_compose.compose.benchmark.architectures import without_weights
from lora_compose.compose.lora.inspection import inspect
from lora_compose.pipelines.concepts.loading import LoraError, match, read_lora
from reference import constant_gates, relative_error

LINEAR, CONVOLUTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", "down_blocks.0.resnets.0.conv1"
ONE = constant_gates((1.0,))[0]
TARGETS = ["to_q", "to_k", "to_out.0", "ff.net.2", "proj_in"]  # the last is a convolution of 1 x 1
Settings = dict[str, Any]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline()


def saved(folder: Path, settings: Settings) -> tuple[Path, Any]:
    """A file as PEFT saves it, with its settings beside it; and the UNet with PEFT's layers."""
    torch.manual_seed(0)
    unet = tiny_unet()
    given = {"r": 0, "oft_block_size": 4, "target_modules": [*TARGETS], **settings}
    config = OFTConfig(**given, module_dropout=0.0, init_weights=False)
    inject_adapter_in_model(config, unet, "cat")
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "oft_R" in name:
                parameter.normal_(std=0.1)
    layers = get_peft_model_state_dict(unet, adapter_name="cat")
    path = folder / "adapter_model.safetensors"
    save_file({f"base_model.model.{key}": tensor.contiguous() for key, tensor in layers.items()}, path)
    words = {name: sorted(it) if isinstance(it, set) else it for name, it in config.to_dict().items()}
    (folder / "adapter_config.json").write_text(json.dumps(words, default=str), encoding="utf-8")
    return path, unet.eval()


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"use_cayley_neumann": False}, {"num_cayley_neumann_terms": 3},
        pytest.param({"num_cayley_neumann_terms": 8}, marks=pytest.mark.slow), {"block_share": True},
    ],
    ids=["default", "exact", "3 terms", "8 terms", "one block"],
)  # fmt: skip
@torch.no_grad()
def test_a_file_of_peft_equals_its_layers(pipe: Any, tmp_path: Path, settings: Settings) -> None:
    path, unet = saved(tmp_path, settings)
    inputs = unet_inputs(unet)
    factors = match(read_lora(path), pipe)
    assert factors.complete
    expected = unet(**inputs)[0]
    assert relative_error(pipe.unet(**inputs)[0], expected) > 0.01
    assert relative_error(with_bank(pipe.unet, [factors.model], ONE, inputs), expected) < 1e-5


def test_what_peft_constrains_in_training_and_absurd_series_are_refused(pipe: Any, tmp_path: Path) -> None:
    path, _ = saved(tmp_path, {"coft": True})
    with pytest.raises(LoraError, match="constrained in training"):
        match(read_lora(path), pipe)
    path, _ = saved(tmp_path, {})
    settings = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"num_cayley_neumann_terms": 10**9}))
    with pytest.raises(LoraError, match="num_cayley_neumann_terms is '1000000000'; expected a number from 1 to 32"):
        match(read_lora(path), pipe)


@torch.no_grad()
def test_convolutions_of_peft_are_left_out_where_they_have_no_one_meaning(pipe: Any, tmp_path: Path) -> None:
    path, unet = saved(tmp_path, {"target_modules": [*TARGETS, "conv1"]})
    layer, x = unet.get_submodule(CONVOLUTION), torch.randn(1, unet.get_submodule(CONVOLUTION).in_features, 6, 6)
    layer.oft_R["cat"].weight.zero_()
    assert relative_error(layer(x), layer.base_layer(x)) > 0.5, "PEFT's layer is another without any rotation"
    factors = match(read_lora(path), pipe)
    (note,) = factors.notes
    assert "layers are left out: PEFT's OFT of convolutions larger than 1 x 1 is not defined" in note
    assert factors.unmatched
    assert all(".conv1." in key for key in factors.unmatched)
    only, _ = saved(tmp_path, {})
    assert factors.model.keys() == match(read_lora(only), pipe).model.keys()
    found, _ = inspect(read_lora(saved(tmp_path, {"target_modules": [*TARGETS, "conv1"]})[0]), pipe, "small")
    assert found.unmatched == factors.unmatched
    assert sum(block.layers for block in found.blocks) == len(factors.model)
    alone, _ = saved(tmp_path, {"target_modules": ["conv1"]})
    with pytest.raises(LoraError, match="is not defined: as it is trained, overlapping patches are added up"):
        match(read_lora(alone), pipe)


@pytest.mark.parametrize("name", [LINEAR, "down_blocks.0.attentions.0.proj_in", CONVOLUTION])
@pytest.mark.parametrize(("shared", "scaled"), [(False, False), (True, False), (False, True)])
@torch.no_grad()
def test_onetrainer_rotates_the_weights_of_convolutions_the_other_way(
    pipe: Any, tmp_path: Path, name: str, shared: bool, scaled: bool
) -> None:
    torch.manual_seed(3)
    layer = pipe.unet.get_submodule(name)
    weight, size = layer.weight.detach().double(), 4
    count = weight[0].numel() // size
    vectors = torch.randn(1 if shared else count, size * (size - 1) // 2) / 10
    tensors = {f"lora_unet_{name.replace('.', '_')}.oft_R.weight": vectors}
    if scaled:
        tensors[f"lora_unet_{name.replace('.', '_')}.oft_R.scaled_oft"] = torch.tensor(True)
    save_file(tensors, tmp_path / "it.safetensors")
    factors = match(read_lora(tmp_path / "it.safetensors"), pipe)
    assert factors.complete

    above = torch.triu_indices(size, size, 1)
    skew = torch.zeros(len(vectors), size, size).double()
    skew[:, above[0], above[1]] = vectors.double() / (2 * 3**0.5 if scaled else 1)
    skew -= skew.mT.clone()
    turns = torch.eye(size) + 2 * skew + 2 * skew @ skew + 2 * skew @ skew @ skew + skew @ skew @ skew @ skew
    blocks = (turns if weight.dim() > 2 else turns.mT).repeat(count if shared else 1, 1, 1)
    rotated = torch.einsum("ork,rkc->orc", weight.reshape(len(weight), count, size), blocks).reshape(weight.shape)
    assert relative_error(factors.model[name].change_of(weight.float()).double(), rotated - weight) < 1e-5

    inputs = unet_inputs(pipe.unet)
    found = with_bank(pipe.unet, [factors.model], ONE, inputs)
    before, layer.weight.data = layer.weight.data, rotated.float()
    expected = pipe.unet(**inputs)[0]
    layer.weight.data = before
    assert relative_error(pipe.unet(**inputs)[0], expected) > 1e-3
    assert relative_error(found, expected) < 1e-5


def test_a_scaled_rotation_of_another_formula_is_refused(pipe: Any, tmp_path: Path) -> None:
    key = f"lora_unet_{LINEAR.replace('.', '_')}.oft_R"
    tensors = {f"{key}.weight": torch.ones(2, 28), f"{key}.scaled_oft": torch.tensor(1)}
    save_file(tensors, tmp_path / "it.safetensors")
    with pytest.raises(LoraError, match=r"oft_R\.scaled_oft is stored as torch\.int64; expected torch\.bool"):
        match(read_lora(tmp_path / "it.safetensors"), pipe)


@pytest.mark.parametrize("prefix", ["oft_unet_", "lora_unet_"])
@pytest.mark.parametrize("name", [LINEAR, CONVOLUTION])
@pytest.mark.parametrize(("alpha", "rescaled"), [(0.0, False), (0.02, False), (1e3, True)])
def test_blocks_rotate_outputs(pipe: Any, tmp_path: Path, name: str, alpha: float, rescaled: bool, prefix: str) -> None:
    torch.manual_seed(2)
    weight = pipe.unet.get_submodule(name).weight.detach()
    blocks, factors = torch.randn(2, len(weight) // 2, len(weight) // 2), 1 + torch.rand(len(weight))
    tensors = {"oft_blocks": blocks, "alpha": torch.tensor(alpha)}
    if rescaled:
        tensors["rescale"] = factors.view(-1, *[1] * (weight.dim() - 1))
    key = f"{prefix}{name.replace('.', '_')}"
    save_file({f"{key}.{slot}": tensor for slot, tensor in tensors.items()}, tmp_path / "it.safetensors")
    found = match(read_lora(tmp_path / "it.safetensors"), pipe).model[name]
    skew = (blocks - blocks.mT).double()
    if 0 < alpha * len(weight) < skew.norm():
        skew *= alpha * len(weight) / skew.norm()
    one = torch.eye(len(weight) // 2).double()
    whole = torch.block_diag(*((one + skew) @ torch.linalg.inv(one - skew)))
    torch.testing.assert_close(whole @ whole.T, torch.eye(len(weight)).double())
    expected = torch.einsum("ab,a...->b...", whole, weight.double())
    if rescaled:
        expected *= factors.double().view(-1, *[1] * (weight.dim() - 1))
    assert relative_error(found.change_of(weight).double(), expected - weight) < 1e-5


def flux(tensors: dict[str, list[int]]) -> Any:
    known = {"metadata": {}, "tensors": {"lora_unet_double_blocks_0_img_attn_qkv": tensors}}
    return match(file_of(known, 1e-3), without_weights("FLUX.1")).model


def test_blocks_are_shared_out_over_the_layers_of_a_model_if_they_end_where_those_do() -> None:
    found = flux({".oft_blocks": [576, 16, 16]})
    assert {tuple(one.transform.values.shape) for one in found.values() if one.transform} == {(192, 16, 16)}
    found = flux({".oft_R.weight": [192, 16 * 15 // 2]})
    assert {tuple(one.transform.values.shape) for one in found.values() if one.transform} == {(192, 16, 16)}
    with pytest.raises(LoraError, match="blocks of size 18 reach over the layers of the model"):
        flux({".oft_blocks": [512, 18, 18]})


def test_numbered_blocks_rotate_the_parts_of_a_fused_layer_each_within_its_own_bound(tmp_path: Path) -> None:
    torch.manual_seed(4)
    model = flux_transformer()
    width = model.inner_dim
    sides = {"double_blocks_0_img_attn_qkv": [width] * 3, "single_blocks_0_linear1": [width] * 3 + [4 * width],
             "single_blocks_0_linear2": [width]}  # fmt: skip
    names = {
        "double_blocks_0_img_attn_qkv": [f"transformer_blocks.0.attn.to_{it}" for it in "qkv"],
        "single_blocks_0_linear1": [
            *(f"single_transformer_blocks.0.attn.to_{it}" for it in "qkv"), "single_transformer_blocks.0.proj_mlp",
        ],
        "single_blocks_0_linear2": ["single_transformer_blocks.0.proj_out"],
    }  # fmt: skip
    tensors, alpha = {}, 0.05
    for layer, outputs in sides.items():
        tensors[f"oft_unet_{layer}.alpha"] = torch.tensor(alpha)
        for i, side in enumerate(outputs):
            tensors[f"oft_unet_{layer}.oft_blocks.{i}"] = torch.randn(4, side // 4, side // 4)
    save_file(tensors, tmp_path / "it.safetensors")
    factors = match(read_lora(tmp_path / "it.safetensors"), SimpleNamespace(transformer=model))
    assert factors.complete
    assert factors.model.keys() == {name for each in names.values() for name in each}
    for layer, each in names.items():
        for i, name in enumerate(each):
            blocks = tensors[f"oft_unet_{layer}.oft_blocks.{i}"]
            weight = model.get_submodule(name).get_parameter("weight").detach()
            skew = (blocks - blocks.mT).double()
            assert skew.norm() > alpha * len(weight)
            skew *= alpha * len(weight) / skew.norm()
            one = torch.eye(len(weight) // 4).double()
            whole = torch.block_diag(*((one + skew) @ torch.linalg.inv(one - skew)))
            expected = whole.T @ weight.double() - weight
            assert relative_error(factors.model[name].change_of(weight).double(), expected) < 1e-5


def test_numbered_blocks_are_as_many_as_the_layers_of_the_model() -> None:
    with pytest.raises(LoraError, match="qkv has 2 parts; expected 3"):
        flux({f".oft_blocks.{i}": [4, 768, 768] for i in range(2)})
    known = {"metadata": {}, "tensors": {"lora_unet_double_blocks_0_img_attn_proj": {}}}
    known["tensors"]["lora_unet_double_blocks_0_img_attn_proj"] = {f".oft_blocks.{i}": [4, 384, 384] for i in range(2)}
    with pytest.raises(LoraError, match="rotates 2 parts of a layer, one in the model"):
        match(file_of(known, 1e-3), without_weights("FLUX.1"))


def test_what_a_file_has_once_is_computed_once_for_all_layers_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    solved: list[tuple[int, ...]] = []
    solve = torch.linalg.solve
    monkeypatch.setattr(torch.linalg, "solve", lambda a, b: solved.append(tuple(a.shape)) or solve(a, b))
    found = flux({".oft_blocks": [576, 16, 16]})
    assert len(found) == 3
    assert solved == [(576, 16, 16)]
