"""Images that the small transformer makes itself while it is trained."""

import torch

from recipe.rollouts import STEPS, Noisy, Rollout


def noised(clean: torch.Tensor, noise: torch.Tensor, time: float, caption: str) -> Noisy:
    times = torch.full((len(clean),), time)
    return Noisy(clean.lerp(noise, time), times, torch.full_like(times, 3.0), [caption] * len(clean))


def test_along_the_true_velocity_every_image_is_reached_and_its_place_taken_by_noise_with_a_new_caption() -> None:
    rng = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(6, 2, 4, 4, generator=rng) for _ in range(2))
    new = noised(clean, noise, 1.0, "a dog")._replace(guidance=torch.full((6,), 5.0))
    rollout = Rollout.of(noised(clean, noise, 1.0, "a cat"), rng)
    begun = torch.zeros(6, dtype=torch.bool)
    for _ in range(STEPS[1]):
        before = rollout.noisy.times
        rollout.advance(noise - clean, new, rng)
        begun |= rollout.noisy.times > before
        on_the_way = rollout.noisy.latents[~begun]
        path = clean.lerp(noise, rollout.noisy.times.view(-1, 1, 1, 1))[~begun]
        torch.testing.assert_close(on_the_way, path)
        assert [caption == "a dog" for caption in rollout.noisy.captions] == begun.tolist()
        assert (rollout.noisy.guidance == 5).tolist() == begun.tolist()
        assert (rollout.noisy.times > 0).all()
    assert begun.all(), "an image takes at most so many steps"


def test_images_of_its_own_take_the_place_of_the_first_of_a_batch() -> None:
    clean, noise = torch.zeros(4, 1, 2, 2), torch.ones(4, 1, 2, 2)
    batch, own = noised(clean, noise, 0.5, "noised"), noised(clean, noise, 0.25, "own").first(1)
    mixed = batch.with_first(own)
    assert mixed.captions == ["own", "noised", "noised", "noised"]
    assert mixed.times.tolist() == [0.25, 0.5, 0.5, 0.5]
    assert mixed.latents.mean(dim=(1, 2, 3)).tolist() == [0.25, 0.5, 0.5, 0.5]
