"""LoRAs of the playgrounds say which one they are for."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_compose.compose.playground.assets import PLAYGROUNDS, playground_of, playground_title
from recipe.loras import set_base


@pytest.mark.parametrize("model", PLAYGROUNDS)
def test_the_playground_is_written_and_everything_else_stays(tmp_path: Path, model: str) -> None:
    file, tensors = tmp_path / "cat.safetensors", {"a": torch.randn(2, 3), "b": torch.randn(4).half()}
    save_file(tensors, file, {"base_model": "a folder", "trigger": "sks"})
    set_base(file, playground_title(model))
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert metadata == {"base_model": playground_title(model), "trigger": "sks"}
    assert playground_of(metadata["base_model"]) == model
    found = load_file(file)
    assert found.keys() == tensors.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
