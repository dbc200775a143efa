"""What Chroma alone has: a mask of numbers, an inpainting that asks for a setting, the names of FLUX.1's layers."""

import copy
from typing import Any

import pytest
import torch
from PIL import Image

from chroma import CHROMA, chroma_pipeline, chroma_transformer
from components import seeded
from lora_compose import ComposePipeline, Concept
from lora_compose.pipelines.families import ComposeChromaPipeline, ComposeFluxPipeline
from transformer_families import CALL, latents_of, pipeline_with_concepts, plain_latents

NOTHING = [Concept(name="cat", weight=0.0)]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return pipeline_with_concepts(CHROMA, tmp_path_factory.mktemp("loras"))


@pytest.mark.parametrize("kind", [torch.float32, torch.bool])
def test_a_mask_hides_padding_only_if_it_is_of_true_and_false_as_in_diffusers(pipe: Any, kind: torch.dtype) -> None:
    given: dict[str, Any] = {"prompt": None}
    for side, words in (("", CALL["prompt"]), ("negative_", "the photo")):
        text, _, mask, *_ = pipe.encode_prompt(words, do_classifier_free_guidance=False, max_sequence_length=48)
        given |= {f"{side}prompt_embeds": text, f"{side}prompt_attention_mask": mask.to(kind)}
    given = {**CALL, **given, "guidance_scale": 3.0}
    expected = plain_latents(CHROMA, pipe, **given)
    words = {"cat": (1, 2, 3, 4)}
    found = latents_of(pipe, concepts=NOTHING, method="merge", token_positions=words, **given)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    as_text = plain_latents(CHROMA, pipe, **CALL, **CHROMA.guided)
    assert torch.allclose(expected, as_text, atol=1e-4) == (kind == torch.float32)


def test_it_inpaints_without_concepts_where_diffusers_looks_for_a_setting_that_the_model_does_not_have(
    pipe: Any,
) -> None:
    transformer = chroma_transformer()
    transformer.load_state_dict(pipe.transformer.state_dict())
    del transformer._internal_dict
    transformer.register_to_config(**{
        name: value for name, value in pipe.transformer.config.items() if name != "guidance_embeds"
    })  # fmt: skip
    released = copy.copy(pipe)
    released.register_modules(transformer=transformer)
    assert not released.runs_as_diffusers(inpaints=True)
    start: dict[str, Any] = {"image": Image.new("RGB", (128, 128), "teal"), "mask_image": (32, 32, 128, 112)}
    given = {**CALL, **CHROMA.guided, **start, "strength": 0.6, "output_type": "latent"}
    found = released(**given, generator=seeded(3)).images
    torch.testing.assert_close(found, pipe(**given, generator=seeded(3)).images, atol=1e-5, rtol=0)


def test_a_checkpoint_in_one_file_is_not_taken_for_flux_1() -> None:
    names = ["double_blocks.0.img_attn.qkv.weight", "distilled_guidance_layer.in_proj.weight"]
    for prefix in ("", "model.diffusion_model."):
        assert ComposePipeline.family_of_keys([prefix + name for name in names]) is ComposeChromaPipeline
    assert ComposePipeline.family_of_keys(names[:1]) is ComposeFluxPipeline


def test_a_callback_ends_guidance_and_does_not_change_its_scale(pipe: Any) -> None:
    def ends(scale: float) -> Any:
        def call(pipe: Any, index: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            pipe._guidance_scale = scale
            return tensors

        return call

    given = {**CALL, **CHROMA.guided, "num_inference_steps": 3}
    for scale in (1.0, 7.0):
        found = latents_of(pipe, concepts=NOTHING, method="merge", callback_on_step_end=ends(scale), **given)
        expected = plain_latents(CHROMA, pipe, callback_on_step_end=ends(scale), **given)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_plain_pipeline_becomes_one_of_ours() -> None:
    assert type(ComposePipeline.from_pipe(chroma_pipeline(CHROMA.plain))) is ComposeChromaPipeline
