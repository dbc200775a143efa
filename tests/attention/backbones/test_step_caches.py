"""diffusers' caches: every pass of a step has a memory of its own, and nothing is kept after a call."""

from typing import Any

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import apply_pyramid_attention_broadcast

from components import tiny_unet
from flux import FLUX, flux_pipeline, flux_transformer
from lora_compose.attention.backbones.step_caches import StepCaches, check_caches
from pairs import slow_but
from transformer_families import latents_of, pipeline_with_concepts

# All of them use what they have kept in the second step.
CONFIGS: dict[str, Any] = {
    "first block": FirstBlockCacheConfig(threshold=1e9),
    "taylor": TaylorSeerCacheConfig(cache_interval=9, disable_cache_before_step=1, max_order=1),
    "mag": MagCacheConfig(threshold=9.0, max_skip_steps=9, retention_ratio=0.0, num_inference_steps=9,
                          mag_ratios=torch.ones(9)),
    "pyramid": PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=9, spatial_attention_timestep_skip_range=(-1, 1001),
        spatial_attention_block_identifiers=("transformer_blocks",), current_timestep_callback=lambda: 500,
    ),
    "faster": FasterCacheConfig(
        spatial_attention_block_skip_range=9, spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: 500, attention_weight_callback=lambda _: 0.0, is_guidance_distilled=True,
        spatial_attention_block_identifiers=("^transformer_blocks.*attn",),
    ),
}  # fmt: skip


def inputs(rows: int, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(rows, 16, 16, generator=generator), "timestep": torch.full((rows,), 0.5),
        "encoder_hidden_states": torch.randn(rows, 6, 24, generator=generator), "guidance": torch.ones(rows),
        "pooled_projections": torch.randn(rows, 24, generator=generator), "txt_ids": torch.zeros(6, 3),
        "img_ids": torch.zeros(16, 3), "return_dict": False,
    }  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_passes_with_other_rows_do_not_read_what_each_other_left(name: str) -> None:
    torch.manual_seed(0)
    model = flux_transformer()
    passes = {"two rows": inputs(2, 0), "three": inputs(3, 1)}
    expected = {key: model(**given)[0] for key, given in passes.items()}
    model.enable_cache(CONFIGS[name])
    computed: list[bool] = []
    model.get_submodule("transformer_blocks.1.attn.to_q").register_forward_hook(lambda *_: computed.append(True))
    with StepCaches.opened(model) as caches:
        for anew in (True, False, True):
            computed.clear()
            for key, given in passes.items():
                with caches.of(key, anew=anew):
                    torch.testing.assert_close(model(**given)[0], expected[key], atol=2e-2, rtol=0)
            assert len(computed) == (2 if anew else 0)
    with StepCaches.opened(model) as caches:  # nothing is left of the call before
        computed.clear()
        with caches.of("two rows", anew=True):
            model(**inputs(1, 2))
        assert computed


def test_a_cache_that_leaves_out_unconditional_rows_is_refused() -> None:
    model = flux_transformer()
    model.enable_cache(
        FasterCacheConfig(current_timestep_callback=lambda: 500, attention_weight_callback=lambda _: 0.5)
    )
    with pytest.raises(ValueError, match=r"FasterCache leaves out the unconditional rows.*disable_cache"):
        check_caches(model, differentiates=False)
    model.disable_cache()
    check_caches(model, differentiates=False)


def test_methods_that_look_at_layers_in_every_step_refuse_caches() -> None:
    unet = tiny_unet()
    config = PyramidAttentionBroadcastConfig(current_timestep_callback=lambda: 500)
    config.spatial_attention_block_skip_range = 2
    apply_pyramid_attention_broadcast(unet, config)
    with pytest.raises(ValueError, match=r"PyramidAttentionBroadcastHook.*merge, tara or regional"):
        check_caches(unet, differentiates=True)
    check_caches(unet, differentiates=False)


@pytest.mark.parametrize("name", slow_but(("first block", "pyramid", "faster"), CONFIGS))
def test_a_call_with_concepts_caches_as_one_of_diffusers_does(name: str, tmp_path: Any) -> None:
    from safetensors.torch import save_file

    from transformer_families import as_file, random_lora_of_all

    pipe = flux_pipeline()
    save_file(dict(as_file(random_lora_of_all(pipe.transformer, 0))), tmp_path / "cat.safetensors")
    pipe.load_concept(tmp_path / "cat.safetensors", trigger="sks", class_word="cat", weight=0.0)
    call: dict[str, Any] = {
        "prompt": "a sks cat", "width": 64, "height": 64, "num_inference_steps": 4, "output_type": "latent",
        "max_sequence_length": 16,
    }  # fmt: skip

    def latents(**arguments: Any) -> torch.Tensor:
        return pipe(**call, generator=torch.Generator().manual_seed(0), **arguments).images

    uncached = latents()
    pipe.transformer.enable_cache(CONFIGS[name])
    if name == "faster":  # diffusers needs a first step outside of the range
        pipe.transformer.disable_cache()
        pipe.transformer.enable_cache(
            FasterCacheConfig(
                spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 900),
                current_timestep_callback=lambda: pipe.current_timestep, attention_weight_callback=lambda _: 0.5,
                is_guidance_distilled=True,
            )
        )  # fmt: skip
    expected = latents()
    torch.testing.assert_close(latents(concepts=["cat"], method="merge"), expected, atol=1e-4, rtol=0)
    assert (expected - uncached).abs().max() > 1e-3


def test_a_cache_that_asks_for_the_timestep_is_told_before_a_method_drafts(tmp_path: Any) -> None:
    pipe, times = pipeline_with_concepts(FLUX, tmp_path), []

    def timestep() -> Any:
        times.append(pipe.current_timestep)
        return times[-1]

    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_block_identifiers=("transformer_blocks",),
        current_timestep_callback=timestep,
    )  # fmt: skip
    pipe.transformer.enable_cache(config)
    latents_of(pipe, concepts=["cat", "dog"], method="draft")
    assert times
    assert None not in times
    assert pipe.current_timestep is None
