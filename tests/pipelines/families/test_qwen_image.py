"""What Qwen-Image alone has: texts without padding in diffusers, guidance by a negative prompt, stretched steps."""

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from lora_compose import Concept
from qwen_image import QWEN_IMAGE
from transformer_families import CALL, latents_of, pipeline_with_concepts, plain_latents

NOTHING = [Concept(name="cat", weight=0.0)]
GUIDED: dict[str, Any] = {**CALL, **QWEN_IMAGE.guided}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return pipeline_with_concepts(QWEN_IMAGE, tmp_path_factory.mktemp("loras"))


@pytest.mark.parametrize("tokens", [32, 48, 100])
def test_masked_padding_changes_nothing(pipe, tokens):
    given = {**GUIDED, "max_sequence_length": tokens}
    found = latents_of(pipe, concepts=NOTHING, method="merge", **given)
    torch.testing.assert_close(found, plain_latents(QWEN_IMAGE, pipe, **given), atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["merge", "tara", "freefuse"])
def test_no_more_tokens_are_run_than_in_diffusers(pipe, method):
    counts: list[int] = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda _, given, named: counts.append(named["encoder_hidden_states"].shape[1]), with_kwargs=True
    )
    try:
        plain_latents(QWEN_IMAGE, pipe, **GUIDED)
        most = max(counts)
        latents_of(pipe, concepts=["cat", "dog"], method=method, **GUIDED)
    finally:
        hook.remove()
    assert max(counts) == most < GUIDED["max_sequence_length"]


def test_a_negative_prompt_beside_embeddings_is_read_whole(pipe):
    long = " and ".join(["a dog on grass"] * 4)
    given = {**GUIDED, "negative_prompt": long, "concepts": ["cat"], "method": "merge"}
    text, mask = pipe.encode_prompt(CALL["prompt"], device="cpu")
    negative, _ = pipe.encode_prompt(long, device="cpu")
    assert text.shape[1] < negative.shape[1] < CALL["max_sequence_length"]
    expected = latents_of(pipe, **given)
    found = latents_of(pipe, **{**given, "prompt": None, "prompt_embeds": text, "prompt_embeds_mask": mask})
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_without_a_negative_prompt_there_is_no_guidance(pipe):
    given = {**CALL, "true_cfg_scale": 3.0}
    found = latents_of(pipe, concepts=NOTHING, method="merge", **given)
    torch.testing.assert_close(found, plain_latents(QWEN_IMAGE, pipe, **given), atol=1e-5, rtol=0)


def test_a_scale_that_is_not_read_is_warned_of(pipe):
    plan = pipe.plan(**GUIDED, guidance_scale=3.0, concepts=["cat"], method="merge")
    assert any("guidance_scale=3 is not read by Qwen-Image" in one for one in plan.warnings)


def test_stretched_steps_are_those_of_diffusers_and_one_alone_is_refused(pipe):
    found = pipe.scheduler
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(found.config, shift_terminal=0.02)
    try:
        ours = latents_of(pipe, concepts=NOTHING, method="merge", **GUIDED)
        torch.testing.assert_close(ours, plain_latents(QWEN_IMAGE, pipe, **GUIDED), atol=1e-5, rtol=0)
        with pytest.raises(ValueError, match="shift_terminal, which needs at least 2 of them"):
            pipe.plan(**{**GUIDED, "num_inference_steps": 1}, concepts=["cat"], method="merge")
    finally:
        pipe.scheduler = found
