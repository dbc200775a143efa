"""Files are read by our readers, and matched by a map of names as ComfyUI makes it."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_compose.attention.transforms import Rescaling
from lora_compose.compose.comfyui.files import read_concept, read_text_encoders
from lora_compose.pipelines.formats.files import LoraError, LoraFile, read_lora

NAMES = {
    "lora_unet_block_qkv": "diffusion_model.block.qkv.weight",
    "diffusion_model.block.qkv": "diffusion_model.block.qkv.weight",
    "transformer.blocks.0.attn.to_q": ("diffusion_model.block.qkv.weight", (0, 0, 4)),
    "transformer.blocks.0.attn.to_v": ("diffusion_model.block.qkv.weight", (0, 8, 4)),
    "transformer.norm_out.linear": (
        "diffusion_model.block.mod.weight",
        None,
        lambda weight: torch.cat(weight.chunk(2)[::-1]),
    ),
    "unet.down.processor.to_out": "diffusion_model.conv.weight",
}

SITES = ["block.qkv", "block.mod", "conv"]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    block = nn.ModuleDict({"qkv": nn.Linear(6, 12), "mod": nn.Linear(6, 8)})
    return nn.ModuleDict({"block": block, "conv": nn.Conv2d(6, 5, 3)})


def lora(stem: str, outputs: int, *inputs: int, rank: int = 2) -> dict[str, Tensor]:
    ones = [1] * (len(inputs) - 1)
    return {
        f"{stem}.lora_A.weight": torch.randn(rank, *inputs),
        f"{stem}.lora_B.weight": torch.randn(outputs, rank, *ones),
    }


def product(tensors: dict[str, Tensor], stem: str) -> Tensor:
    return tensors[f"{stem}.lora_B.weight"].flatten(1) @ tensors[f"{stem}.lora_A.weight"].flatten(1)


def written(folder: Path, tensors: dict[str, Tensor]) -> LoraFile:
    save_file(tensors, folder / "a.safetensors")
    return read_lora(folder / "a.safetensors")


def test_parts_of_a_fused_layer_are_put_into_their_rows(model: nn.Module, tmp_path: Path) -> None:
    q, v = "transformer.blocks.0.attn.to_q", "transformer.blocks.0.attn.to_v"
    tensors = lora(q, 4, 6) | lora(v, 4, 6, rank=3)
    found, notes = read_concept(written(tmp_path, tensors), model, NAMES, SITES)
    wanted = torch.cat([product(tensors, q), torch.zeros(4, 6), product(tensors, v)])
    assert torch.allclose(found["block.qkv"].delta(), wanted, atol=1e-5)
    assert not notes


def test_the_order_of_rows_is_that_of_the_model(model: nn.Module, tmp_path: Path) -> None:
    tensors = lora("transformer.norm_out.linear", 8, 6)
    found, _ = read_concept(written(tmp_path, tensors), model, NAMES, SITES)
    wanted = product(tensors, "transformer.norm_out.linear")
    assert torch.allclose(found["block.mod"].delta(), torch.cat([wanted[4:], wanted[:4]]), atol=1e-5)


@pytest.mark.parametrize("stem", ["unet.down.to_out.0", "unet.down.processor.to_out", "unet.down.to_out"])
def test_older_names_of_a_layer_mean_the_same(model: nn.Module, tmp_path: Path, stem: str) -> None:
    tensors = lora(stem, 5, 6, 3, 3)
    found, _ = read_concept(written(tmp_path, tensors), model, NAMES, SITES)
    assert torch.allclose(found["conv"].delta().flatten(1), product(tensors, stem), atol=1e-5)


def test_a_dora_keeps_its_norms(model: nn.Module, tmp_path: Path) -> None:
    stem = "diffusion_model.block.qkv"
    tensors = lora(stem, 12, 6) | {f"{stem}.lora_magnitude_vector": torch.rand(12) + 0.5}
    found, _ = read_concept(written(tmp_path, tensors), model, NAMES, SITES)
    assert isinstance(found["block.qkv"].transform, Rescaling)
    part = "transformer.blocks.0.attn.to_q"
    tensors = lora(part, 4, 6) | {f"{part}.lora_magnitude_vector": torch.rand(4) + 0.5}
    with pytest.raises(LoraError, match=r"of a part of block\.qkv"):
        read_concept(written(tmp_path, tensors), model, NAMES, SITES)


def test_rotations_of_convolutions_are_read_where_they_have_one_meaning(model: nn.Module, tmp_path: Path) -> None:
    tensors = {
        "diffusion_model.block.qkv.oft_R.weight": torch.rand(3, 1),
        "down.to_out.0.oft_R.weight": torch.rand(27, 1),
    }
    found, notes = read_concept(written(tmp_path, tensors), model, NAMES, SITES)
    assert (found.keys(), notes) == ({"block.qkv", "conv"}, [])
    of_peft = {f"base_model.model.{key}": tensor for key, tensor in tensors.items()}
    found, notes = read_concept(written(tmp_path, of_peft), model, NAMES, SITES)
    assert found.keys() == {"block.qkv"}
    assert "1 layers are left out: PEFT's OFT of convolutions larger than 1 x 1 is not defined" in notes[0]


def test_what_is_for_text_encoders_is_read_apart(tmp_path: Path) -> None:
    mine = lora("lora_te_text_model_encoder_layers_0_mlp_fc1", 8, 4)
    mine["lora_te_text_model_encoder_layers_0_mlp_fc1.alpha"] = torch.tensor(1.0)
    found = read_text_encoders(written(tmp_path, lora("lora_unet_block_qkv", 12, 6) | mine))
    assert found.keys() == mine.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in mine.items())


def test_what_is_left_out_is_said(model: nn.Module, tmp_path: Path) -> None:
    tensors = lora("lora_unet_block_qkv", 12, 6) | lora("lora_te_text_model_encoder_layers_0_mlp_fc1", 8, 4)
    tensors |= lora("lora_unet_elsewhere", 8, 4)
    found, notes = read_concept(written(tmp_path, tensors), model, NAMES, SITES)
    assert [*found] == ["block.qkv"]
    assert notes[0].startswith("2 keys fit no layer and are left out: lora_unet_elsewhere")


def test_a_t_lora_whose_ranks_do_not_follow_the_noise_is_said(model: nn.Module, tmp_path: Path) -> None:
    save_file(lora("lora_unet_block_qkv", 12, 6), tmp_path / "a.safetensors", {"ss_tlora_min_rank": "1"})
    found, notes = read_concept(read_lora(tmp_path / "a.safetensors"), model, NAMES, SITES)
    assert found["block.qkv"].rank == 2
    assert "it is a T-LoRA, trained with fewer ranks where there is more noise" in notes[0]


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (lora("lora_unet_elsewhere", 8, 4), "fits this model in 0 of its 1 layers"),
        (lora("lora_unet_block_qkv", 12, 7), "a side of 7, the model's layer has 6; choose a LoRA that"),
        (lora("transformer.blocks.0.attn.to_q", 5, 6), "a side of 5"),
        (
            {f"lora_unet_block_qkv.oft_blocks.{i}": torch.zeros(2, 2, 2) for i in range(3)},
            "it rotates 3 parts of a layer",
        ),
        (lora("lora_unet_block_qkv", 12, 6) | lora("transformer.blocks.0.attn.to_q", 4, 6), "more than one LoRA"),
    ],
)
def test_what_does_not_fit_is_refused(model: nn.Module, tmp_path: Path, tensors: dict, said: str) -> None:
    with pytest.raises(LoraError, match=re.escape(said)):
        read_concept(written(tmp_path, tensors), model, NAMES, SITES)
