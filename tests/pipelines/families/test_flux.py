"""FLUX through the same seam as the UNets: equal to a slow dense reference, and to diffusers where LoRAs are plain."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, FluxPipeline
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from components import sd_unet, seeded
from flux import CELLS, TOKENS, Places, as_file, dense_loras, flux_lora, flux_pipeline, plain_latents
from lora_compose import Clora, ComposePipeline, Concept, Control, LoraComposer, Merge, Regional, Tara
from lora_compose.attention.backbones import backbone_of
from lora_compose.pipelines.families.flux import ComposeFluxPipeline

PROMPT = "a sks cat and a zwx dog on grass"
SKS, ZWX = (1, 2, 3, 4), (8, 9, 10, 11)  # tokens of the triggers: a space of their own, and three letters each
LEFT, RIGHT = (0, 0, 64, 128), (64, 0, 128, 128)
CALL: dict[str, Any] = {
    "prompt": PROMPT, "width": 128, "height": 128, "num_inference_steps": 3, "max_sequence_length": TOKENS,
}  # fmt: skip
GUIDED: dict[str, Any] = {"negative_prompt": "the photo", "true_cfg_scale": 3.0}


@pytest.fixture
def pipe(tmp_path) -> Any:
    """Two concepts with LoRAs on every linear layer."""
    pipe = flux_pipeline()
    for seed, (name, trigger) in enumerate((("cat", "sks"), ("dog", "zwx"))):
        path = tmp_path / f"{name}.safetensors"
        save_file(dict(as_file(flux_lora(pipe.transformer, seed))), path)
        pipe.load_concept(path, trigger=trigger, class_word=name)
    return pipe


def latents_of(pipe: Any, **arguments: Any) -> Tensor:
    return pipe(**{**CALL, "generator": seeded(3), "output_type": "latent", **arguments}).images


def dense(pipe: Any, places: Any, **arguments: Any) -> Tensor:
    """The same call of diffusers' own pipeline with dense deltas; it runs both halves of guidance apart."""
    loras = [loaded.factors.model for loaded in pipe.resolve_concepts(["cat", "dog"])]
    calls = iter(range(10**6))
    guided = "true_cfg_scale" in arguments

    def of_call(rows: int) -> Places:
        return places(rows, bool(guided and conditional[0] is False))

    conditional = [True]
    forward = pipe.transformer.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        conditional[0] = next(calls) % 2 == 0 or not guided  # diffusers runs the conditional half first
        return forward(*args, **kwargs)

    pipe.transformer.forward = counted
    try:
        with dense_loras(pipe.transformer, loras, of_call):
            return plain_latents(pipe, **{**CALL, **arguments})
    finally:
        del pipe.transformer.forward


def merged(rows: int, unconditional: bool) -> Places:
    ones = torch.ones(rows, 1, 2)
    return Places(ones.expand(rows, TOKENS, 2), ones.expand(rows, CELLS**2, 2), ones[:, 0])


def own_words(rows: int, unconditional: bool) -> Places:
    everywhere = merged(rows, unconditional)
    text = torch.zeros(rows, TOKENS, 2)
    if not unconditional:
        text[:, SKS, 0] = text[:, ZWX, 1] = 1
    return Places(text, everywhere.image, everywhere.modulation)


def regions(rows: int, unconditional: bool) -> Places:
    live = 0.0 if unconditional else 1.0
    image = torch.zeros(rows, CELLS, CELLS, 2)
    image[:, :, : CELLS // 2, 0] = image[:, :, CELLS // 2 :, 1] = live
    return Places(torch.full((rows, TOKENS, 2), live), image.flatten(1, 2), torch.zeros(rows, 2))


BOXES = [Concept(name="cat", region=LEFT), Concept(name="dog", region=RIGHT)]
METHODS: dict[str, tuple[Any, Sequence[Any], Any]] = {
    "merge": ("merge", ["cat", "dog"], merged),
    "tara": (Tara(), ["cat", "dog"], own_words),
    "regional": (Regional(token_mask="none", texts="shared"), BOXES, regions),
}


@pytest.mark.parametrize("guidance", [{}, GUIDED], ids=["distilled guidance", "with a negative prompt"])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_equals_dense_deltas_one_concept_after_the_other(pipe, method, guidance):
    settings, concepts, places = METHODS[method]
    found = latents_of(pipe, concepts=concepts, method=settings, **guidance)
    torch.testing.assert_close(found, dense(pipe, places, **guidance), atol=2e-5, rtol=0)
    assert (found - plain_latents(pipe, **CALL, **guidance)).abs().max() > 0.01


@pytest.mark.parametrize("guidance", [{}, GUIDED], ids=["distilled guidance", "with a negative prompt"])
def test_without_concepts_it_does_exactly_what_diffusers_does(pipe, guidance):
    assert torch.equal(latents_of(pipe, **guidance), plain_latents(pipe, **CALL, **guidance))


def test_concepts_of_weight_zero_change_nothing(pipe):
    concepts = [Concept(name=name, weight=0.0) for name in ("cat", "dog")]
    torch.testing.assert_close(
        latents_of(pipe, concepts=concepts, method="merge"), plain_latents(pipe, **CALL), atol=1e-6, rtol=0
    )


def test_one_merged_lora_equals_diffusers_with_the_lora_loaded(pipe, tmp_path):
    found = latents_of(pipe, concepts=["cat"], method="merge")
    plain = FluxPipeline(**copy.deepcopy(pipe).components)
    plain.set_progress_bar_config(disable=True)
    plain.load_lora_weights(tmp_path / "cat.safetensors")
    expected: Any = plain(**CALL, generator=seeded(3), output_type="latent")
    torch.testing.assert_close(found, expected.images, atol=2e-5, rtol=0)


def test_nothing_of_a_call_stays_in_the_transformer(pipe):
    before = {name: type(module) for name, module in pipe.transformer.named_modules()}
    processors = dict(pipe.transformer.attn_processors)
    latents_of(pipe, concepts=["cat", "dog"], method="tara", record_attention=True)
    assert {name: type(module) for name, module in pipe.transformer.named_modules()} == before
    assert pipe.transformer.attn_processors == processors


def test_prompts_with_different_concept_sets_give_the_images_of_separate_calls(pipe):
    prompts, sets = [PROMPT, "a zwx dog"], [["cat", "dog"], ["dog"]]
    noise = torch.randn(2, 4, 16, 16, generator=seeded(1))
    both = latents_of(pipe, prompt=prompts, concepts=sets, method="tara", latents=noise)
    for i, (prompt, concepts) in enumerate(zip(prompts, sets, strict=True)):
        alone = latents_of(pipe, prompt=prompt, concepts=concepts, method="tara", latents=noise[i : i + 1])
        torch.testing.assert_close(both[i : i + 1], alone, atol=2e-5, rtol=0)


@pytest.mark.parametrize("swapped", [False, True])
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


def test_recorded_maps_say_how_much_cells_attend_to_the_words_of_each_concept(pipe):
    output = pipe(**CALL, concepts=["cat", "dog"], method="merge", record_attention=[0, -1], output_type="latent")
    assert output.recorded_steps == (0, 2)
    assert output.attention_maps.shape == (2, 1, 2, CELLS, CELLS)
    assert (output.attention_maps > 0).all()
    assert output.attention_maps.sum(dim=2).max() < 1  # two words of all tokens and cells


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


def test_images_are_decoded_as_in_diffusers(pipe):
    nothing = [Concept(name="cat", weight=0.0)]
    ours, plain = (
        pipe(**CALL, generator=seeded(3), output_type="np", **given).images for given in ({"concepts": nothing}, {})
    )
    assert ours.shape == plain.shape == (1, 128, 128, 3)
    assert abs(ours - plain).max() < 1e-5


@pytest.mark.parametrize("settings", [LoraComposer(), Clora()])
def test_methods_with_region_attention_say_that_they_are_not_supported_yet(pipe, settings):
    with pytest.raises(ValueError, match=r"needs region attention.*use merge, tara or regional"):
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
    pipe.load_lora_weights(tmp_path / "dog.safetensors", adapter_name="other")
    found = latents_of(pipe, concepts=["cat"], method="merge")
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_fused_projections_are_refused_until_undone(pipe):
    expected = latents_of(pipe, concepts=["cat"], method="merge")
    for attn in pipe.transformer.modules():
        if hasattr(attn, "fuse_projections"):
            attn.fuse_projections()
    with pytest.raises(ValueError, match=r"fused projections.*unfuse_qkv_projections"):
        latents_of(pipe, concepts=["cat"], method="merge")
    for attn in pipe.transformer.modules():
        if hasattr(attn, "unfuse_projections"):
            attn.unfuse_projections()
    torch.testing.assert_close(latents_of(pipe, concepts=["cat"], method="merge"), expected, atol=1e-6, rtol=0)


def test_every_linear_layer_has_a_site(pipe):
    sites = backbone_of(pipe.transformer).sites
    streams = {name: site.stream for name, site in sites.items()}
    expected = {
        "x_embedder": "image", "context_embedder": "text", "proj_out": "image", "norm_out.linear": "modulation",
        "time_text_embed.timestep_embedder.linear_1": "modulation", "transformer_blocks.0.attn.to_q": "image",
        "transformer_blocks.0.attn.add_q_proj": "text", "transformer_blocks.0.attn.to_add_out": "text",
        "transformer_blocks.0.ff.net.0.proj": "image", "transformer_blocks.0.ff_context.net.2": "text",
        "transformer_blocks.0.norm1.linear": "modulation", "transformer_blocks.0.norm1_context.linear": "modulation",
        "single_transformer_blocks.1.attn.to_v": "joint", "single_transformer_blocks.1.proj_mlp": "joint",
        "single_transformer_blocks.1.norm.linear": "modulation",
    }  # fmt: skip
    assert {name: streams[name] for name in expected} == expected
    assert set(flux_lora(pipe.transformer, 0)) <= sites.keys()


def test_without_a_method_one_that_works_is_chosen_and_blending_is_warned_of(pipe, caplog):
    assert isinstance(pipe.resolve_method(None, pipe.resolve_concepts(BOXES), [PROMPT]), Regional)
    assert isinstance(pipe.resolve_method(None, pipe.resolve_concepts(["cat", "dog"]), [PROMPT]), Merge)
    assert "subjects blend" in caplog.text
    caplog.clear()
    assert isinstance(pipe.resolve_method(None, pipe.resolve_concepts(["cat"]), [PROMPT]), Merge)
    assert "blend" not in caplog.text
