"""Guiders against diffusers' own pipelines, and against formulas on packed tokens."""

from typing import Any

import pytest
import torch
from diffusers import QwenImagePipeline
from torch import Tensor

from components import seeded
from lora_compose import Draft
from lora_compose.pipelines.denoising.guidance import NormLimited, TokenNorms
from lora_compose.pipelines.denoising.passes import Prediction
from lora_compose.pipelines.denoising.sampler import Schedule
from lora_compose.pipelines.scene.canvas import Step
from lora_compose.pipelines.scene.rows import Rows
from transformer_families import CALL, as_file, latents_of, pipeline_with_concepts, plain_latents, random_lora_of_all
from z_image import Z_IMAGE

GUIDED: dict[str, Any] = {**Z_IMAGE.guided, "num_inference_steps": 4, "num_images_per_prompt": 2}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The small Z-Image with two concepts."""
    return pipeline_with_concepts(Z_IMAGE, tmp_path_factory.mktemp("loras"))


@pytest.fixture(scope="module")
def with_cat(pipe: Any) -> Any:
    """The same in diffusers, with the cat's LoRA loaded."""
    other = Z_IMAGE.pipeline()
    other.load_lora_weights(as_file(random_lora_of_all(pipe.transformer, 0)))
    return other


# At the four timesteps of the call, 1000, about 900, 750 and 500, the schedule is at 0, 0.1, 0.25 and 0.5.
@pytest.mark.parametrize(("given", "guided_steps"), [
    ({"cfg_normalization": True}, 4),
    ({"cfg_truncation": 0.2}, 2),
    ({"cfg_truncation": -1.0}, 0),
    pytest.param({"cfg_truncation": None}, 4, marks=pytest.mark.slow),
    ({"cfg_normalization": 0.7, "cfg_truncation": 0.4}, 3),
])  # fmt: skip
def test_normalisation_and_truncation_of_z_image_are_those_of_diffusers(pipe, with_cat, given, guided_steps):
    expected = plain_latents(Z_IMAGE, with_cat, **CALL | GUIDED | given)
    found = pipe(**CALL | GUIDED | given, concepts=["cat"], method="merge", generator=seeded(3), output_type="latent")
    torch.testing.assert_close(found.images, expected, atol=3e-5, rtol=0)
    assert found.cost.rows_forward == 2 * (4 + guided_steps)


def test_truncation_holds_for_image_to_image_too(pipe, with_cat):
    call = {**CALL, **GUIDED, "cfg_truncation": 0.4, "image": torch.rand(1, 3, 128, 128, generator=seeded(0))}
    call |= {"strength": 0.7, "width": None, "height": None}
    expected = plain_latents(Z_IMAGE, with_cat, Z_IMAGE.image_tasks[False], **call)
    found = latents_of(pipe, **{**call, "concepts": ["cat"], "method": "merge"})
    torch.testing.assert_close(found, expected, atol=3e-5, rtol=0)


def test_a_draft_that_is_longer_than_guidance_is_drafted_without_it(pipe):
    """Of three drafted steps the third has no unconditional rows, and its maps are those of conditional rows."""
    call = {**CALL, **GUIDED, "concepts": ["cat", "dog"], "generator": seeded(3), "output_type": "latent"}
    call |= {"method": Draft(length=4), "cfg_truncation": 0.2, "record_attention": [0]}
    found = pipe(**call)
    assert found.cost.rows_forward == 2 * (2 + 2 + 1) + 2 * (2 + 2 + 1 + 1)
    assert found.draft_maps.amax(dim=(-2, -1)).min() > 0


def test_a_callback_may_change_the_scale_where_there_is_no_guidance(pipe, with_cat):
    def louder(pipe: Any, step: int, t: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 4.0 if step == 1 else pipe._guidance_scale
        return {}

    call = {**CALL, **GUIDED, "cfg_truncation": 0.2, "callback_on_step_end": louder}
    found = latents_of(pipe, **call, concepts=["cat"], method="merge")
    torch.testing.assert_close(found, plain_latents(Z_IMAGE, with_cat, **call), atol=3e-5, rtol=0)


def prediction_of(uncond: Tensor, cond: Tensor) -> Prediction:
    return Prediction(torch.cat([uncond, cond]), Rows.of(len(cond), 1))


def test_tokens_keep_their_norm_as_in_qwen_image():
    uncond, cond = (torch.randn(2, 4, 6, 8, generator=seeded(seed)) for seed in (0, 1))
    cond[0, :, :2, :2] = uncond[0, :, :2, :2] = 0  # a norm of 0 must not become NaN
    found = TokenNorms(4.0).combine(prediction_of(uncond, cond), Step(0, 1, torch.tensor(1), cfg_scale=4.0))
    packed: Any = QwenImagePipeline._pack_latents
    tokens, kept, whole = (packed(one, 2, 4, 6, 8) for one in (found, cond, uncond + 4.0 * (cond - uncond)))
    expected = whole * torch.nan_to_num(kept.norm(dim=-1, keepdim=True) / whole.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(tokens, expected)


def test_a_limit_bounds_each_image_by_itself():
    uncond, cond = (torch.randn(2, 4, 6, 8, generator=seeded(seed)) for seed in (0, 1))
    uncond[1] = cond[1]  # whose guided prediction is the conditional one, and below the limit
    step = Step(0, 1, torch.tensor(1), cfg_scale=4.0)
    found = NormLimited(4.0, 0.5).combine(prediction_of(uncond, cond), step)
    torch.testing.assert_close(found.flatten(1).norm(dim=1), cond.flatten(1).norm(dim=1) / 2)
    found = NormLimited(4.0, 1.5).combine(prediction_of(uncond, cond), step)
    torch.testing.assert_close(found[1], cond[1])


def test_steps_without_guidance_are_known_before_the_first():
    guider, timesteps = NormLimited(4.0, until=0.4), torch.tensor([1000.0, 601.0, 599.0, 100.0])
    schedule = Schedule(timesteps, 4, 1, guider.unguided(timesteps))
    assert [schedule.step(index, 4.0).guided for index in range(4)] == [True, True, False, False]
    assert not schedule.step(0, 1.0).guided
