"""Rates and decay of the weights of a LoRA, by what they are."""

from pathlib import Path

import pytest
import torch
from torch import nn

from lora_compose.compose.training import Training
from lora_compose.compose.training.optimizers import optimizers_of, set_rate

NAMES = ("linear.lora_A.default.weight", "conv.lora_A.default.weight", "linear.lora_magnitude_vector.default.weight")


def parameters() -> dict[str, nn.Parameter]:
    shapes = ((4, 16), (4, 16, 3, 3), (16,))
    return {name: nn.Parameter(torch.ones(shape)) for name, shape in zip(NAMES, shapes, strict=True)}


def settings(optimizer: str) -> Training:
    return Training(
        model="sd", images=Path("images"), out=Path("out.safetensors"), trigger="sks", class_word="cat",
        optimizer=optimizer, learning_rate=0.5, weight_decay=0.1,
    )  # fmt: skip


def step_without_gradients(weights: dict[str, nn.Parameter], optimizer: str, rate: float) -> None:
    for weight in weights.values():
        weight.grad = torch.zeros_like(weight)
    for each in optimizers_of(weights, settings(optimizer)):
        set_rate(each, rate)
        each.step()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_magnitudes_of_a_dora_stay_at_the_norms_that_they_begin_with(optimizer: str) -> None:
    if optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this PyTorch has no Muon")
    weights = parameters()
    step_without_gradients(weights, optimizer, rate=0.5)
    linear, convolution, magnitudes = weights.values()
    assert (linear < 1).all()
    assert (convolution < 1).all()
    assert torch.equal(magnitudes, torch.ones(16))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this PyTorch has no Muon")
def test_beside_muon_the_first_update_of_a_convolution_is_as_large_as_that_of_a_matrix() -> None:
    torch.manual_seed(0)
    weights = {name: nn.Parameter(weight.detach()) for name, weight in parameters().items()}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    for weight in weights.values():
        weight.grad = torch.randn_like(weight)
    for each in optimizers_of(weights, settings("muon").model_copy(update={"weight_decay": 0.0})):
        set_rate(each, 0.1)
        each.step()
    moved = [(weights[name] - before[name]).square().mean().sqrt().item() for name in NAMES[:2]]
    assert moved == pytest.approx([0.2 * 0.1] * 2, rel=0.2)
