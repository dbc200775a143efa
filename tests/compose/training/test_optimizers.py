"""What decays of a LoRA."""

from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn

from lora_compose.compose.training import Training
from lora_compose.compose.training.optimizers import optimizers_of

NAMES = ("linear.lora_A.default.weight", "conv.lora_A.default.weight", "linear.lora_magnitude_vector.default.weight")


def parameters() -> dict[str, nn.Parameter]:
    shapes = ((4, 16), (4, 16, 3, 3), (16,))
    return {name: nn.Parameter(torch.ones(shape)) for name, shape in zip(NAMES, shapes, strict=True)}


def settings(optimizer: Literal["adamw", "muon"]) -> Training:
    return Training(
        model="sd", images=Path("images"), out=Path("out.safetensors"), trigger="sks", class_word="cat",
        optimizer=optimizer, learning_rate=0.5, weight_decay=0.1,
    )  # fmt: skip


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_magnitudes_of_a_dora_stay_at_the_norms_that_they_begin_with(optimizer: Literal["adamw", "muon"]) -> None:
    if optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this PyTorch has no Muon")
    weights = parameters()
    for weight in weights.values():
        weight.grad = torch.zeros_like(weight)
    for each in optimizers_of(weights, settings(optimizer)):
        each.step()
    linear, convolution, magnitudes = weights.values()
    assert (linear < 1).all()
    assert (convolution < 1).all()
    assert torch.equal(magnitudes, torch.ones(16))
