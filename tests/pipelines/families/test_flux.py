"""What FLUX has of its own: packed latents, two texts, distilled guidance, fused projections."""

from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, FluxPipeline
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from components import sd_unet, seeded, small_vae, with_library
from flux import FLUX, flux_pipeline
from lora_compose import Clora, ComposePipeline, Concept, Control, Draft, LoraComposer, Merge
from lora_compose.attention.backbones import backbone_of
from lora_compose.pipelines.calls.resolved_call import resolve_choice
from lora_compose.pipelines.families.flux import ComposeFluxPipeline
from transformer_families import TOKENS, as_file, pipeline_with_concepts, plain_latents, random_lora_of_all

PROMPT = "a sks cat and a zwx dog on grass"
LEFT, RIGHT = (0, 0, 64, 128), (64, 0, 128, 128)
CALL: dict[str, Any] = {
    "prompt": PROMPT, "width": 128, "height": 128, "num_inference_steps": 3, "max_sequence_length": TOKENS,
}  # fmt: skip
GUIDED = FLUX.guided


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Any:
    """Two concepts with LoRAs on every linear layer."""
    return pipeline_with_concepts(FLUX, tmp_path_factory.mktemp("loras")).library


@pytest.fixture
def pipe(library) -> Any:
    return with_library(flux_pipeline(), library)


def latents_of(pipe: Any, **arguments: Any) -> Tensor:
    return pipe(**{**CALL, "generator": seeded(3), "output_type": "latent", **arguments}).images


BOXES = [Concept(name="cat", region=LEFT), Concept(name="dog", region=RIGHT)]


def test_concepts_of_weight_zero_change_nothing(pipe):
    concepts = [Concept(name=name, weight=0.0) for name in ("cat", "dog")]
    torch.testing.assert_close(
        latents_of(pipe, concepts=concepts, method="merge"), plain_latents(FLUX, pipe, **CALL), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("swapped", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_regions_of_one_prompt_leave_another_without_concepts_alone(pipe, swapped):
    prompts, sets = [PROMPT, "a dog on grass"], [BOXES, []]
    if swapped:
        prompts, sets = prompts[::-1], sets[::-1]
    noise = torch.randn(2, 4, 16, 16, generator=seeded(1))
    both = latents_of(pipe, prompt=prompts, concepts=sets, method="regional", latents=noise)
    for i, (prompt, concepts) in enumerate(zip(prompts, sets, strict=True)):
        method = "regional" if concepts else None
        given = noise[i : i + 1] if concepts else FluxPipeline._pack_latents(noise[i : i + 1], 1, 4, 16, 16)
        alone = latents_of(pipe, prompt=prompt, concepts=concepts, method=method, latents=given)
        torch.testing.assert_close(both[i : i + 1], alone, atol=2e-5, rtol=0)


def test_one_negative_prompt_is_for_all_prompts(pipe):
    noise = torch.randn(2, 4, 16, 16, generator=seeded(1))
    given = {"concepts": ["cat", "dog"], "method": "merge", **GUIDED, "negative_prompt_2": "a photo of grass"}
    both = latents_of(pipe, prompt=[PROMPT] * 2, latents=noise, **given)
    torch.testing.assert_close(both[1:], latents_of(pipe, latents=noise[1:], **given), atol=2e-5, rtol=0)


def test_a_negative_prompt_of_a_concepts_own_replaces_both_of_the_call(pipe):
    concept = Concept(name="cat", negative_prompt="a dog")
    given = {"method": "switch", "prompt": "a sks cat", "true_cfg_scale": 3.0}
    own = latents_of(pipe, concepts=[concept], negative_prompt="the photo", negative_prompt_2="grass", **given)
    torch.testing.assert_close(own, latents_of(pipe, concepts=["cat"], negative_prompt="a dog", **given))


def test_the_average_of_one_pass_is_that_pass(pipe):
    found = [latents_of(pipe, concepts=["cat"], method=method) for method in ("composite", "merge")]
    torch.testing.assert_close(*found, atol=2e-5, rtol=0)


def test_packed_and_unpacked_start_noise_is_the_same(pipe):
    noise = torch.randn(1, 4, 16, 16, generator=seeded(1))
    packed = FluxPipeline._pack_latents(noise, 1, 4, 16, 16)
    found = [latents_of(pipe, concepts=["cat"], method="merge", latents=one) for one in (noise, packed)]
    torch.testing.assert_close(*found, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match=r"latents have the shape .*expected \[1, 4, 16, 16\] or \[1, 64, 16\]"):
        latents_of(pipe, concepts=["cat"], method="merge", latents=noise[:, :2])


def test_a_callback_ends_guidance_and_sees_the_timestep(pipe):
    scales, times, rows = [], [], []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
    )

    def after_step(pipe: Any, step: int, t: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        times.append((float(pipe.current_timestep), float(t)))
        if step == 1:
            pipe._guidance_scale = 0.0
        scales.append(pipe.guidance_scale)
        return tensors

    latents_of(pipe, concepts=["cat", "dog"], method="merge", callback_on_step_end=after_step, **GUIDED)
    assert rows == [2, 2, 1]
    assert all(current == given for current, given in times)
    assert len({t for t, _ in times}) == 3
    assert pipe.current_timestep is None


def test_generators_are_counted(pipe):
    with pytest.raises(ValueError, match="there are 2 generators for 1 images"):
        latents_of(pipe, concepts=["cat"], method="merge", generator=[seeded(0), seeded(1)])


@pytest.mark.parametrize("settings", [LoraComposer(), Clora()])
def test_methods_of_unets_name_those_that_work_here(pipe, settings):
    with pytest.raises(ValueError, match=r"needs cross-attention.*use draft.*regional"):
        latents_of(pipe, concepts=BOXES, method=settings)


def test_a_control_is_refused(pipe):
    net: Any = ControlNetModel.from_unet(sd_unet(), conditioning_embedding_out_channels=(4, 8, 8, 8))
    control = Control(model=net, image=Image.new("RGB", (128, 128)))
    with pytest.raises(ValueError, match="controls work with Stable Diffusion"):
        latents_of(pipe, concepts=["cat"], control=control)


def test_a_saved_pipeline_is_opened_by_its_family(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    opened = ComposePipeline.from_pretrained(tmp_path / "model")
    assert isinstance(opened, ComposeFluxPipeline)
    assert isinstance(ComposePipeline.from_pipe(FluxPipeline(**pipe.components)), ComposeFluxPipeline)


def test_diffusers_own_layers_and_no_others_have_a_site(pipe):
    pipe.transformer.new_layer = torch.nn.Linear(4, 4)
    sites = backbone_of(pipe.transformer).sites
    assert "new_layer" not in sites
    linear = {name for name, module in pipe.transformer.named_modules() if isinstance(module, torch.nn.Linear)}
    assert linear - {"new_layer"} <= sites.keys()


def test_a_concept_acts_beside_an_adapter_of_diffusers(pipe, tmp_path):
    expected = latents_of(pipe, concepts=["cat", "dog"], method="merge")
    save_file(dict(as_file(random_lora_of_all(pipe.transformer, 1))), tmp_path / "dog.safetensors")
    pipe.load_lora_weights(tmp_path / "dog.safetensors", adapter_name="other")
    found = latents_of(pipe, concepts=["cat"], method="merge")
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_loras_act_where_projections_are_fused(pipe):
    expected, plain = latents_of(pipe, concepts=["cat"], method="merge"), latents_of(pipe)
    for attn in pipe.transformer.modules():
        if hasattr(attn, "fuse_projections"):
            attn.fuse_projections()
    torch.testing.assert_close(latents_of(pipe, concepts=["cat"], method="merge"), expected, atol=1e-5, rtol=0)
    assert pipe.transformer.transformer_blocks[0].attn.fused_projections, "what was found is put back"
    torch.testing.assert_close(latents_of(pipe), plain, atol=1e-5, rtol=0)


def test_every_linear_layer_has_a_site(pipe):
    sites = backbone_of(pipe.transformer).sites
    parts = {name: "+".join(site.parts) for name, site in sites.items()}
    expected = {
        "x_embedder": "image", "context_embedder": "text", "proj_out": "image", "norm_out.linear": "modulation",
        "time_text_embed.timestep_embedder.linear_1": "modulation", "transformer_blocks.0.attn.to_q": "image",
        "transformer_blocks.0.attn.add_q_proj": "text", "transformer_blocks.0.attn.to_add_out": "text",
        "transformer_blocks.0.ff.net.0.proj": "image", "transformer_blocks.0.ff_context.net.2": "text",
        "transformer_blocks.0.norm1.linear": "modulation", "transformer_blocks.0.norm1_context.linear": "modulation",
        "single_transformer_blocks.1.attn.to_v": "text+image", "single_transformer_blocks.1.proj_mlp": "text+image",
        "single_transformer_blocks.1.norm.linear": "modulation",
    }  # fmt: skip
    assert {name: parts[name] for name in expected} == expected
    assert set(random_lora_of_all(pipe.transformer, 0)) <= sites.keys()


def test_without_a_method_one_that_works_is_chosen(pipe):
    for concepts, method in ((BOXES, Draft), (["cat", "dog"], Draft), (["cat"], Merge)):
        assert isinstance(resolve_choice(None, pipe.resolve_concepts(concepts), [PROMPT]).method, method)


@pytest.mark.parametrize(("made_for", "side"), [(64, 64), (1024, 1024), (32, 1024)])
def test_the_size_is_what_the_vae_was_made_for_and_otherwise_that_of_diffusers(made_for, side):
    pipe = flux_pipeline()
    pipe.register_modules(vae=small_vae(shift_factor=0.1, sample_size=made_for))
    assert pipe.own_size == (side, side)
    assert pipe.default_sample_size * pipe.vae_scale_factor == 1024
