"""Output types, sizes, schedulers, guidance and the VAE in calls with concepts."""

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import HeunDiscreteScheduler, LCMScheduler
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from PIL import Image

from components import small_pipeline
from composing import (
    SD_AND_SLOWLY_XL,
    UPDATES,
    as_tensor,
    assert_close,
    compose,
    composer_of,
    far_apart,
    latents_of,
    one_step,
    same_bits,
)
from lora_compose.pipelines.images.output import ComposeOutput
from lora_compose.pipelines.scene.scene import Concept

EACH = pytest.mark.parametrize(("family", "method"), [("sd", UPDATES), ("sdxl", "tara")])
"""Each family, and with updates and without."""


@EACH
def test_dict_and_tuple_hold_the_same(family: str, method: Any) -> None:
    composer = composer_of(family, whole=True)
    for given in ({"method": method}, {"concepts": None, "method": None}):
        output = one_step(composer, output_type="np", **given)
        images, *rest = one_step(composer, output_type="np", return_dict=False, **given)
        assert isinstance(output, ComposeOutput) == (given["method"] is not None)
        assert all(same_bits(images, same) for same in (output.images, output["images"], output[0]))
        assert rest == ([None] if family == "sd" else [])


@SD_AND_SLOWLY_XL
def test_all_output_types_show_the_same_images(family: str) -> None:
    given = {"width": 96, "height": 64, "num_images_per_prompt": 2}
    kinds = ("np", "pt", "pil", "latent")
    as_np, as_pt, as_pil, latents = (compose(composer_of(family), output_type=kind, **given).images for kind in kinds)
    assert (as_np.shape, as_np.dtype) == ((2, 64, 96, 3), np.float32)
    assert latents.shape == (2, 4, 8, 12)
    np.testing.assert_allclose(as_np, as_pt.permute(0, 2, 3, 1).numpy(), atol=1e-6)
    assert [(type(image), image.size) for image in as_pil] == [(Image.Image, (96, 64))] * 2
    np.testing.assert_allclose(as_np * 255, as_tensor(as_pil).float().numpy(), atol=0.51)


@SD_AND_SLOWLY_XL
def test_the_vae_may_work_in_slices_and_tiles(composer):
    arguments = {"output_type": "pt", "num_images_per_prompt": 2, "width": 192}
    whole = compose(composer, **arguments).images
    composer.vae.enable_slicing()
    assert_close(compose(composer, **arguments).images, whole)
    composer.vae.enable_tiling()
    latents = latents_of(composer, **arguments | {"output_type": "latent"})
    tiled = composer.vae.decode(latents / composer.vae.config.scaling_factor).sample.detach()
    images = compose(composer, **arguments).images
    assert torch.equal(images, composer.image_processor.postprocess(tiled, output_type="pt"))
    assert far_apart(images, whole)


@pytest.mark.parametrize(
    ("width", "height", "method"),
    [
        (8, 8, "tara"),
        (136, 40, "composite"),
        pytest.param(104, 72, "tara", marks=pytest.mark.slow),
        pytest.param(8, 8, "composite", marks=pytest.mark.slow),
    ],
)
def test_any_size_works_with_and_without_regions(load_concepts, method, width, height):
    pipe = small_pipeline()
    pipe.set_progress_bar_config(disable=True)
    load_concepts(pipe, "cat", "dog")
    for region in (None, (0, 0, width // 2, height), (width - 1, height - 1, width, height)):
        concepts = [Concept(name="cat", region=region), "dog"]
        arguments = {"concepts": concepts, "width": width, "height": height, "record_attention": True}
        output = compose(pipe, method=method, num_inference_steps=1, **arguments)
        assert output.images.shape == (1, 4, height // 8, width // 8)
        assert torch.isfinite(output.images).all()
        grid = [(size // 8 + 3) // 4 for size in (height, width)]
        assert output.attention_maps.shape == (1, 1, 2, *grid)


def test_the_size_of_the_model_is_the_default(composer):
    assert torch.equal(latents_of(composer), latents_of(composer, width=128, height=128))
    assert latents_of(composer, width=64).shape == (1, 4, 16, 8)


@pytest.mark.parametrize(("scheduler", "steps", "guidance"), [(LCMScheduler, 1, 1.0), (HeunDiscreteScheduler, 2, 5.0)])
def test_callbacks_and_costs_count_calls_of_the_model(composer, scheduler, steps, guidance):
    composer.scheduler = scheduler.from_config(composer.scheduler.config)
    seen = []

    def count(pipe, step, timestep, tensors):
        seen.append(step)
        return tensors

    output = compose(composer, num_inference_steps=steps, guidance_scale=guidance, callback_on_step_end=count)
    calls = steps if scheduler is not HeunDiscreteScheduler else 2 * steps - 1
    assert seen == list(range(calls))
    assert output.cost.rows_forward == calls * (2 if guidance > 1 else 1)
    assert torch.isfinite(output.images).all()


COMPARED = (
    "DDPMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler", "PNDMScheduler", "UniPCMultistepScheduler",
)  # fmt: skip
"""Schedulers whose images `test_as_in_diffusers.py` compares with diffusers' own."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(one.name, marks=pytest.mark.slow) if one.name == "KDPM2AncestralDiscreteScheduler" else one.name
        for one in KarrasDiffusionSchedulers
        if one.name not in COMPARED
    ],
)
def test_every_other_scheduler_of_diffusers_makes_an_image_of_the_same_shape(composer: Any, name: str) -> None:
    if name == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde")
    composer.scheduler = getattr(diffusers, name).from_config(composer.scheduler.config)
    found = one_step(composer, num_inference_steps=3).images
    assert found.shape == (1, 4, 16, 16)
    assert found.isfinite().all()


@EACH
def test_guidance_is_on_above_1_and_costs_a_row_of_its_own(composer: Any, method: Any) -> None:
    guided, without, none = (one_step(composer, method=method, guidance_scale=scale) for scale in (1.5, 1.0, 0.0))
    assert guided.cost.rows_forward == 2 * without.cost.rows_forward == 2 * none.cost.rows_forward
    assert not composer.do_classifier_free_guidance
    assert (guided.images - without.images).abs().max() > 1e-3


@EACH
def test_freeu_changes_the_image_until_it_is_switched_off(composer: Any, method: Any) -> None:
    expected = one_step(composer, method=method).images
    composer.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert (one_step(composer, method=method).images - expected).abs().max() > 1e-3
    composer.disable_freeu()
    assert torch.equal(one_step(composer, method=method).images, expected)
