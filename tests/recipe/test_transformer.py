"""Training of the small transformer."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor, nn

from components import small_pipeline
from flux import flux_pipeline
from lora_compose.attention.backbones.joint import image_positions, packed
from recipe.averaged import CHECKED_AT, AveragedTrainer
from recipe.teacher import Teacher
from recipe.transformer import Routed
from recipe.unet import NOISE


def test_with_all_tokens_in_all_blocks_the_velocity_is_that_of_diffusers() -> None:
    transformer = flux_pipeline(num_layers=2, num_single_layers=3, guidance_embeds=True).transformer
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    tokens, times, guidance = packed(latents), torch.tensor([0.25, 0.75]), torch.tensor([1.0, 5.0])
    text = torch.randn(2, 5, transformer.config.joint_attention_dim)
    pooled = torch.randn(2, transformer.config.pooled_projection_dim)
    positions = image_positions(latents)
    expected = transformer(
        tokens, text, pooled, times, img_ids=positions, txt_ids=torch.zeros(5, 3), guidance=guidance, return_dict=False
    )[0]
    routed = Routed(transformer)
    velocity, telling = routed(tokens, times, guidance, text, pooled, positions, kept=16)
    assert telling.shape == (2, 16, transformer.inner_dim)
    torch.testing.assert_close(velocity, expected, rtol=0, atol=1e-6)
    order = torch.randperm(16)
    mixed, _ = routed(tokens[:, order], times, guidance, text, pooled, positions[order], kept=16)
    torch.testing.assert_close(mixed, expected[:, order], rtol=0, atol=1e-6)
    some, _ = routed(tokens, times, guidance, text, pooled, positions, kept=8)
    assert some.shape == expected.shape
    assert not torch.allclose(some, expected, atol=1e-3)


def test_a_weight_that_gets_no_gradient_is_named() -> None:
    used, unused = nn.Linear(2, 2), nn.Linear(2, 2)

    class Trainer(AveragedTrainer[Tensor]):
        def loss(self, batch: Tensor) -> Tensor:
            return used(batch).pow(2).mean()

    trainer = Trainer([used, unused], lambda name, weight: weight.ndim == 2, 0.01, 0)
    for _ in range(CHECKED_AT):
        trainer.learn(torch.randn(3, 2), 1.0)
    with pytest.raises(ValueError, match=r"2 weights get no gradient, e\.g\. 1\.weight"):
        trainer.learn(torch.randn(3, 2), 1.0)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_teacher_expects_the_image_that_its_scheduler_predicts_at_the_same_noise(scale: float) -> None:
    pipe = small_pipeline(StableDiffusionPipeline)
    scheduler: Any = DDIMScheduler(**NOISE, clip_sample=False)
    scheduler.set_timesteps(1000)
    pipe.scheduler = scheduler
    teacher = Teacher(pipe)
    step = 600
    clean, noise = (torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(n)) for n in range(2))
    time = teacher.times[step]
    velocity = teacher.velocity(clean.lerp(noise, time), time.expand(2), ["a cat", ""], torch.tensor([scale, 1.0]))
    noisy = scheduler.add_noise(clean, noise, torch.tensor([step, step]))
    text = pipe.encode_prompt(["a cat", ""], "cpu", 1, do_classifier_free_guidance=False)[0]
    with torch.no_grad():
        predicted = pipe.unet(noisy, step, text).sample
        predicted[:1] = scale * predicted[:1] + (1 - scale) * pipe.unet(noisy[:1], step, text[1:]).sample
    expected = scheduler.step(predicted, step, noisy).pred_original_sample
    torch.testing.assert_close(clean.lerp(noise, time) - time * velocity, expected, rtol=0, atol=0.03 * (1 + scale))


def test_the_copy_of_the_text_encoder_that_teaches_is_not_trained() -> None:
    pipe = small_pipeline(StableDiffusionPipeline)
    teacher = Teacher(pipe)
    assert not any(weight.requires_grad for weight in [*teacher.unet.parameters(), *teacher.words.parameters()])
    assert all(weight.requires_grad for weight in pipe.text_encoder.parameters())
