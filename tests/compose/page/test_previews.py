"""Previews while an image is made, for every family that the page can open."""

from typing import Any

import pytest
import torch

from all_transformers import EVERY, MODULAR, TRANSFORMERS
from components import seeded
from lora_compose.compose.page.work import look
from pairs import slow_but
from transformer_families import CALL


@pytest.mark.parametrize("name", slow_but(TRANSFORMERS.keys() - {"anima", "krea2"}, EVERY))
def test_the_latents_of_the_last_step_look_like_the_image(name: str) -> None:
    family = EVERY[name]
    pipe, seen = family.pipeline(), []

    def keep(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(look(pipe, tensors["latents"], (128, 128)))
        return {}

    given = {**CALL, **family.unguided, "num_inference_steps": 1, "generator": seeded(3)}
    if name not in MODULAR:  # whose calls without concepts have no callbacks
        image = pipe(**given, callback_on_step_end=keep).images[0]
        assert seen[0].size == (128, 128)
        assert (as_tensor(seen[0]) - as_tensor(image)).abs().max() <= 1
    large = torch.randn(1, 4, 96, 64, generator=seeded(0))
    assert look(pipe, large, (512, 768)).size == (8 * 22, 8 * 32)


def as_tensor(image: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).int()
