"""LoRA files with the names of original checkpoints: fused layers are shared out among those of the model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from chroma import chroma_transformer
from flux import flux_transformer
from flux2 import flux2_transformer
from flux3 import flux3_transformer
from ideogram4 import ideogram4_transformer
from krea2 import krea2_transformer
from lora_compose.attention import Lora, LoraFactors
from lora_compose.pipelines.concepts.loading import LoraError, match, read_lora
from pairs import in_pairs
from qwen_image import qwen_image_transformer
from z_image import z_image_transformer


class Parts:
    """What `match` needs of a pipeline."""

    def __init__(self, transformer: Any) -> None:
        self.transformer = transformer


FUSED: Mapping[str, tuple[Any, str, Sequence[str]]] = {
    "chroma, modulation": (
        chroma_transformer, "distilled_guidance_layer.layers.0.in_layer",
        ["distilled_guidance_layer.layers.0.linear_1"],
    ),
    "chroma, single block": (
        chroma_transformer, "single_blocks.0.linear1",
        [*(f"single_transformer_blocks.0.attn.to_{x}" for x in "qkv"), "single_transformer_blocks.0.proj_mlp"],
    ),
    "flux": (flux_transformer, "double_blocks.1.img_attn.qkv", [f"transformer_blocks.1.attn.to_{x}" for x in "qkv"]),
    "flux, text": (
        flux_transformer, "double_blocks.1.txt_attn.qkv", [f"transformer_blocks.1.attn.add_{x}_proj" for x in "qkv"],
    ),
    "flux, single block": (
        flux_transformer, "single_blocks.0.linear1",
        [*(f"single_transformer_blocks.0.attn.to_{x}" for x in "qkv"), "single_transformer_blocks.0.proj_mlp"],
    ),
    "flux2": (flux2_transformer, "double_blocks.0.img_attn.qkv", [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"]),
    "flux2, single block": (
        flux2_transformer, "single_blocks.1.linear1", ["single_transformer_blocks.1.attn.to_qkv_mlp_proj"],
    ),
    "ideogram4": (ideogram4_transformer, "layers.1.attention.qkv", [f"layers.1.attention.to_{x}" for x in "qkv"]),
    "ideogram4, output": (ideogram4_transformer, "layers.1.attention.o", ["layers.1.attention.to_out.0"]),
    "krea2": (krea2_transformer, "blocks.2.attn.wq", ["transformer_blocks.2.attn.to_q"]),
    "krea2, text": (krea2_transformer, "txtfusion.refiner_blocks.0.mlp.up", ["text_fusion.refiner_blocks.0.ff.up"]),
    "z-image": (z_image_transformer, "layers.1.attention.qkv", [f"layers.1.attention.to_{x}" for x in "qkv"]),
    "z-image, output": (z_image_transformer, "layers.1.attention.out", ["layers.1.attention.to_out.0"]),
}  # fmt: skip


def sides(transformer: Any, names: Sequence[str]) -> tuple[int, list[int]]:
    layers = [transformer.get_submodule(name) for name in names]
    return layers[0].in_features, [layer.out_features for layer in layers]


def read(tmp_path: Path, tensors: Mapping[str, Tensor], transformer: Any) -> Lora:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "it.safetensors")
    return match(read_lora(tmp_path / "it.safetensors"), Parts(transformer)).model


PREFIXES = ("diffusion_model.", "lora_unet_", "base_model.model.diffusion_model.", "")


@pytest.mark.parametrize(("case", "prefix"), in_pairs(FUSED, PREFIXES))
def test_a_layer_of_the_original_checkpoint_is_shared_out_in_order(tmp_path: Path, case: str, prefix: str) -> None:
    build, original, names = FUSED[case]
    transformer = build()
    inputs, outputs = sides(transformer, names)
    down, up = torch.randn(4, inputs), torch.randn(sum(outputs), 4)
    kohya = prefix == "lora_unet_"
    stem = prefix + (original.replace(".", "_") if kohya else original)
    tensors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(2.0)}
    found = read(tmp_path, tensors, transformer)
    assert [*found] == [*names]
    whole = torch.cat([factors.delta() for factors in found.values()])
    torch.testing.assert_close(whole, LoraFactors(down, up, 0.5).delta())


BUILDS = {
    "chroma": chroma_transformer, "flux": flux_transformer, "flux2": flux2_transformer,
    "flux3": flux3_transformer, "ideogram4": ideogram4_transformer, "krea2": krea2_transformer,
    "z-image": z_image_transformer, "qwen-image": qwen_image_transformer,
}  # fmt: skip


@pytest.mark.parametrize("family", BUILDS)
def test_a_file_may_change_every_linear_layer_of_a_model(tmp_path: Path, family: str) -> None:
    transformer = BUILDS[family]()
    layers = {name: layer for name, layer in transformer.named_modules() if isinstance(layer, torch.nn.Linear)}
    tensors = {}
    for name, layer in layers.items():
        tensors[f"transformer.{name}.lora_A.weight"] = torch.ones(2, layer.in_features)
        tensors[f"transformer.{name}.lora_B.weight"] = torch.ones(layer.out_features, 2)
    assert read(tmp_path, tensors, transformer).keys() == layers.keys()


@pytest.mark.parametrize("family", ["flux", "flux2", "z-image"])
@pytest.mark.parametrize("stem", ["diffusion_model.final_layer.adaLN_modulation.1", "final_layer.adaLN_modulation.1"])
def test_scale_and_shift_of_the_last_layer_are_in_the_order_of_the_model(
    tmp_path: Path, family: str, stem: str
) -> None:
    transformer = BUILDS[family]()
    name = "all_final_layer.2-1.adaLN_modulation.1" if family == "z-image" else "norm_out.linear"
    layer = transformer.get_submodule(name)
    down, up = torch.randn(2, layer.in_features), torch.randn(layer.out_features, 2)
    found = read(tmp_path, {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}, transformer)
    half = layer.out_features // 2
    rows = up if family == "z-image" else torch.cat([up[half:], up[:half]])  # Z-Image has no shift
    torch.testing.assert_close(found[name].delta(), rows @ down)


def test_a_lokr_of_a_fused_layer_is_its_kronecker_product(tmp_path: Path) -> None:
    transformer, names = flux2_transformer(), [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"]
    first, second = torch.randn(4, 4), torch.randn(24, 8)
    stem = "diffusion_model.double_blocks.0.img_attn.qkv"
    found = read(tmp_path, {f"{stem}.lokr_w1": first, f"{stem}.lokr_w2": second}, transformer)
    whole = torch.cat([found[name].delta() for name in names])
    torch.testing.assert_close(whole, torch.kron(first, second), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("outer", "exact"), [(6, True), (4, False)], ids=["whole rows", "parts of rows"])
def test_a_lokr_of_more_rank_stays_a_product_where_layers_have_whole_rows_of_it(
    tmp_path: Path, outer: int, exact: bool
) -> None:
    transformer, names = flux2_transformer(), [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"]
    first, second = torch.randn(outer, 4), torch.randn(96 // outer, 8)
    stem = "diffusion_model.double_blocks.0.img_attn.qkv"
    save_file({f"{stem}.lokr_w1": first, f"{stem}.lokr_w2": second}, tmp_path / "it.safetensors")
    found = match(read_lora(tmp_path / "it.safetensors"), Parts(transformer), max_rank=8, products=True)
    whole = torch.cat([found.model[name].delta() for name in names])
    assert torch.allclose(whole, torch.kron(first, second), atol=1e-4) == exact
    assert ("cut to it" in found.report) != exact


def test_what_does_not_fit_is_reported(tmp_path: Path) -> None:
    stem = "diffusion_model.double_blocks.0.img_attn.qkv"
    wrong = {f"{stem}.lora_A.weight": torch.ones(2, 32), f"{stem}.lora_B.weight": torch.ones(64, 2)}
    with pytest.raises(LoraError, match=r"double_blocks_0_img_attn_qkv has 64 outputs; expected 96, those of .*to_q"):
        read(tmp_path, wrong, flux_transformer())
    stem = "diffusion_model.blocks.0.attn.wq"
    other = {f"{stem}.lora_A.weight": torch.ones(2, 32), f"{stem}.lora_B.weight": torch.ones(32, 2)}
    with pytest.raises(LoraError, match=r"matches no layer of this model.*looks like a file for Krea 2"):
        read(tmp_path, other, flux_transformer())
