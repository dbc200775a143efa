"""Models for training: what is refused, and where its parts are."""

from pathlib import Path

import pytest
import torch
from diffusers import EDMEulerScheduler
from torch import nn

from lora_compose.compose.files.paths import ModelError
from lora_compose.compose.training.model import on_device, open_base
from simulated_device import DEVICE, parameters_that_move
from trainings import sd_pipeline


def test_a_noise_schedule_without_betas_is_refused(tmp_path: Path) -> None:
    pipe = sd_pipeline()
    pipe.register_modules(scheduler=EDMEulerScheduler())
    pipe.save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match="a noise schedule without betas"):
        open_base(str(tmp_path / "model"))


def test_parts_are_on_the_device_for_as_long_as_they_are_used() -> None:
    encoder, there = nn.Linear(2, 2), nn.Linear(2, 2)
    with parameters_that_move():
        there.to(DEVICE)
        with on_device([encoder, None, "a tokenizer", there], DEVICE):
            assert {encoder.weight.device, there.weight.device} == {DEVICE}
        assert encoder.weight.device == torch.device("cpu")
        assert there.weight.device == DEVICE


def test_parts_come_back_after_an_error() -> None:
    encoder = nn.Linear(2, 2)
    with parameters_that_move(), pytest.raises(RuntimeError, match="no memory"), on_device([encoder], DEVICE):
        raise RuntimeError("no memory")
    assert encoder.weight.device == torch.device("cpu")
