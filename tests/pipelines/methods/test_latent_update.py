"""One update of the latents along a gradient."""

import pytest
import torch

from components import seeded
from lora_compose.pipelines.methods.latent_update import descend


def test_raw_multiplies_the_gradient_and_rms_scales_it_for_each_image():
    latents, gradient = torch.randn(2, 3, 4, 4, 4, generator=seeded())
    gradient[1] *= 1e-4
    torch.testing.assert_close(descend(latents, gradient, 0.5, "raw"), latents - 0.5 * gradient)
    moved = latents - descend(latents, gradient, 0.5, "rms")
    torch.testing.assert_close(moved.square().mean(dim=(1, 2, 3)).sqrt(), torch.full((3,), 0.5))
    alike = torch.cosine_similarity(moved.flatten(1), gradient.flatten(1))
    torch.testing.assert_close(alike, torch.ones(3), atol=1e-4, rtol=0)


@pytest.mark.parametrize("rule", ["raw", "rms"])
def test_images_that_are_not_active_keep_their_latents(rule):
    latents, gradient = torch.randn(2, 3, 4, 4, 4, generator=seeded())
    found = descend(latents, gradient, 0.5, rule, torch.tensor([True, False, True]))
    assert (found != latents).flatten(1).any(dim=1).tolist() == [True, False, True]
    torch.testing.assert_close(found[[0, 2]], descend(latents, gradient, 0.5, rule)[[0, 2]])


@pytest.mark.parametrize("rule", ["raw", "rms"])
def test_a_gradient_of_zero_moves_nothing_and_latents_keep_their_precision(rule):
    latents = torch.randn(1, 4, 4, 4, generator=seeded()).to(torch.bfloat16)
    found = descend(latents, torch.zeros(latents.shape), 0.5, rule)
    assert torch.equal(found, latents)
    assert found.dtype == torch.bfloat16
