"""How far the small transformer is from its teacher, on the way of each."""

import pytest
import torch
from torch import Tensor

from flux import flux_pipeline
from recipe.drift import drifts, velocity_of


def to_the_image(latents: Tensor, times: Tensor) -> Tensor:
    """The velocity towards an image of zeros."""
    return latents / times.view(-1, 1, 1, 1)


def test_a_student_that_stays_right_does_not_drift_and_one_that_strays_is_off_on_its_own_way_alone() -> None:
    noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    same = [*drifts(to_the_image, to_the_image, noise, 5)]
    assert [drift.time for drift in same] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    assert all(drift[1:] == (0, 0) for drift in same)

    def strays(latents: Tensor, times: Tensor) -> Tensor:
        """Wrong at pure noise; afterwards it only knows the straight way."""
        return 2 * latents if times[0] == 1 else noise

    first, *others = drifts(strays, to_the_image, noise, 5)
    assert first.taught == pytest.approx(float(noise.square().mean()))
    assert all(drift.taught == pytest.approx(0, abs=1e-9) for drift in others)
    assert all(drift.own > 0.01 for drift in others)


def test_the_velocity_is_that_of_the_transformer_for_the_prompts() -> None:
    pipe = flux_pipeline(guidance_embeds=True)
    latents = torch.randn(2, pipe.transformer.config.in_channels // 4, 8, 8, generator=torch.Generator().manual_seed(0))
    velocity = velocity_of(pipe, ["a cat", "a dog"])
    with torch.no_grad():
        both = velocity(latents, torch.tensor([0.5, 0.5]))
        assert both.shape == latents.shape
        alone = velocity_of(pipe, ["a dog"])(latents[1:], torch.tensor([0.5]))
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-5)
    assert not torch.allclose(both[:1], alone, atol=1e-3)
