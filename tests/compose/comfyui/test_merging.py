"""Concepts become one file that ComfyUI and our reader read, with the text encoders' LoRAs in it."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_compose.compose.comfyui.concepts import NodeConcept
from lora_compose.compose.comfyui.files import read_concept, read_text_encoders
from lora_compose.compose.comfyui.merging import merge_concepts
from lora_compose.compose.comfyui.showing import merged_text, text_about
from lora_compose.compose.comfyui.words import MERGERS
from lora_compose.compose.lora.merging import Report
from lora_compose.compose.page.labels import MERGER_LABELS
from lora_compose.pipelines.formats.files import read_lora
from lora_compose.pipelines.merging import MERGERS as EVERY_MERGER

NAMES = {
    name: f"diffusion_model.blocks.0.{layer}.weight"
    for layer in ("qkv", "conv")
    for name in (f"diffusion_model.blocks.0.{layer}", f"lora_unet_blocks_0_{layer}")
}
SITES = ["blocks.0.qkv", "blocks.0.conv"]
TEXT = "lora_te_text_model_encoder_layers_0_mlp_fc1"


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    block = nn.ModuleDict({"qkv": nn.Linear(6, 12), "conv": nn.Conv2d(6, 5, 3)})
    return nn.ModuleDict({"blocks": nn.ModuleList([block])})


def concept(folder: Path, name: str, weight: float, tensors: dict[str, Tensor]) -> NodeConcept:
    save_file(tensors, folder / f"{name}.safetensors")
    return NodeConcept.of(folder / f"{name}.safetensors", "sks", "cat", weight)


def path_of(concept: NodeConcept) -> Path:
    assert concept.path is not None
    return concept.path


def of_trainer(start: str, *inputs: int, outputs: int, rank: int = 2) -> dict[str, Tensor]:
    ones = [1] * (len(inputs) - 1)
    return {
        f"{start}.lora_down.weight": torch.randn(rank, *inputs),
        f"{start}.lora_up.weight": torch.randn(outputs, rank, *ones),
        f"{start}.alpha": torch.tensor(1.0),
    }


@pytest.fixture
def two(tmp_path: Path) -> list[NodeConcept]:
    """Two files whose layers have the names of different trainers; the second has no LoRA of a text encoder."""
    first = of_trainer("lora_unet_blocks_0_qkv", 6, outputs=12) | of_trainer(TEXT, 4, outputs=8)
    second = of_trainer("diffusion_model.blocks.0.qkv", 6, outputs=12, rank=3)
    second |= of_trainer("diffusion_model.blocks.0.conv", 6, 3, 3, outputs=5)
    return [concept(tmp_path, "cat", 1.0, first), concept(tmp_path, "dog", 0.5, second)]


def test_a_weight_that_changes_over_the_steps_is_refused(
    model: nn.Module, two: list[NodeConcept], tmp_path: Path
) -> None:
    fading = NodeConcept.of(two[0].path, "sks", "cat", 1.0, schedule="1..0")
    with pytest.raises(ValueError, match=r"cat\.safetensors has a schedule, but a file has no steps; clear it"):
        merge_concepts([fading, two[1]], [{}, {}], model, "cat", tmp_path / "out.safetensors")


def merged(model: nn.Module, concepts: list[NodeConcept], method: str, out: Path) -> Report:
    loras = [read_concept(read_lora(path_of(one)), model, NAMES, SITES, products=False)[0] for one in concepts]
    return merge_concepts(concepts, loras, model, method, out)


def read(path: Path, model: nn.Module) -> dict[str, Tensor]:
    return {name: factors.delta() for name, factors in read_concept(read_lora(path), model, NAMES, SITES)[0].items()}


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_the_file_is_the_weighted_sum(model: nn.Module, two: list[NodeConcept], tmp_path: Path, method: str) -> None:
    report = merged(model, two, method, tmp_path / "out/both.safetensors")
    cat, dog = (read(path_of(one), model) for one in two)
    both = read(tmp_path / "out/both.safetensors", model)
    assert torch.allclose(both["blocks.0.qkv"], cat["blocks.0.qkv"] + 0.5 * dog["blocks.0.qkv"], atol=1e-5)
    assert torch.allclose(both["blocks.0.conv"], 0.5 * dog["blocks.0.conv"], atol=1e-5)
    own, found = read_text_encoders(read_lora(path_of(two[0]))), load_file(tmp_path / "out/both.safetensors")
    wanted = own[f"{TEXT}.lora_up.weight"] @ own[f"{TEXT}.lora_down.weight"] / 2
    product = found[f"{TEXT}.lora_B.weight"] @ found[f"{TEXT}.lora_A.weight"]
    assert torch.allclose(product, wanted, atol=1e-5)
    assert {key.split(".lora_")[0] for key in found} == {*(f"diffusion_model.{name}" for name in SITES), TEXT}
    said = merged_text(report)
    assert f"{tmp_path / 'out/both.safetensors'}: 3 layers" in said
    assert re.search(r"dog\.safetensors, weight 0\.5: kept \d", said)


@pytest.mark.parametrize("method", MERGERS)
def test_every_offered_method_writes_a_file(
    model: nn.Module, two: list[NodeConcept], tmp_path: Path, method: str
) -> None:
    report = merged(model, two, method, tmp_path / "both.safetensors")
    assert report.blocks[-1].norm > 0
    assert text_about(read_lora(tmp_path / "both.safetensors")).count(f"merged by: {method}") == 1


def test_the_methods_are_those_without_images_and_peft_in_the_words_of_the_page() -> None:
    assert {name for name, merger in EVERY_MERGER.items() if not merger.needs_model} == {*MERGERS, "ties"}
    assert {name: MERGER_LABELS[name][1] for name in MERGERS} == MERGERS


def test_a_dora_is_merged_as_the_change_that_it_makes(model: nn.Module, tmp_path: Path) -> None:
    start = "lora_unet_blocks_0_qkv"
    tensors = of_trainer(start, 6, outputs=12) | {f"{start}.dora_scale": torch.rand(12, 1) + 0.5}
    dora = concept(tmp_path, "dora", 1.0, tensors)
    plain = concept(tmp_path, "plain", 0.0, of_trainer(start, 6, outputs=12))
    report = merged(model, [dora, plain], "cat", tmp_path / "both.safetensors")
    weight = model.get_submodule("blocks.0.qkv").get_parameter("weight")
    grown = weight + tensors[f"{start}.lora_up.weight"] @ tensors[f"{start}.lora_down.weight"] / 2
    wanted = tensors[f"{start}.dora_scale"] * grown / grown.norm(dim=1, keepdim=True) - weight
    assert torch.allclose(read(tmp_path / "both.safetensors", model)["blocks.0.qkv"], wanted, atol=1e-4)
    assert "note: dora.safetensors: 1 layers rescale" in merged_text(report)


@pytest.mark.parametrize(
    ("number", "weight", "method", "said"),
    [
        (1, 1.0, "cat", "there is nothing to merge: chain two concepts with LoRAs or more"),
        (3, 1.0, "np", "np takes two files, a subject and then a style; 3 were given"),
        (2, 0.0, "cat", "every weight is 0; there is nothing to merge"),
    ],
)
def test_what_cannot_be_merged_is_refused(
    model: nn.Module, tmp_path: Path, number: int, weight: float, method: str, said: str
) -> None:
    tensors = of_trainer("lora_unet_blocks_0_qkv", 6, outputs=12)
    with pytest.raises(ValueError, match=re.escape(said)):
        merged(model, [concept(tmp_path, "a", weight, tensors)] * number, method, tmp_path / "both.safetensors")
    assert not (tmp_path / "both.safetensors").exists()


def test_a_file_is_told_by_its_own_keys(two: list[NodeConcept]) -> None:
    said = text_about(read_lora(path_of(two[1]))).splitlines()
    assert said[0] == "format: LoRA, keys of ComfyUI"
    assert said[1].startswith("made for: unknown")
    assert said[3:] == ["unet blocks: 2 layers, rank 2/3, alpha 1"]
