"""Training of the small transformer."""

import torch

from flux import flux_pipeline
from lora_compose.attention.backbones.joint import image_positions, packed
from recipe.transformer import Routed


def test_with_all_tokens_in_all_blocks_the_velocity_is_that_of_diffusers() -> None:
    transformer = flux_pipeline(num_layers=2, num_single_layers=3, guidance_embeds=False).transformer
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    tokens, times = packed(latents), torch.tensor([0.25, 0.75])
    text = torch.randn(2, 5, transformer.config.joint_attention_dim)
    pooled = torch.randn(2, transformer.config.pooled_projection_dim)
    positions = image_positions(latents)
    expected = transformer(
        tokens, text, pooled, times, img_ids=positions, txt_ids=torch.zeros(5, 3), return_dict=False
    )[0]
    routed = Routed(transformer)
    velocity = routed(tokens, times, text, pooled, positions, torch.arange(tokens.shape[1]))
    torch.testing.assert_close(velocity, expected, rtol=0, atol=1e-6)
    some = routed(tokens, times, text, pooled, positions, torch.arange(0, tokens.shape[1], 2))
    assert some.shape == expected.shape
    assert not torch.allclose(some, expected, atol=1e-3)
