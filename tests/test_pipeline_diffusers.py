"""The composing pipeline is an ordinary diffusers pipeline: the same bits without concepts, and its components are
opened, saved and shared like those of any other."""

import copy
import inspect
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderTiny,
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    ConsistencyDecoderVAE,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import SDCFGCutoffCallback, SDXLCFGCutoffCallback
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPTextModel

from components import FAMILIES, TINY, random_lora, sd_unet, small_pipeline, tiny_xl_pipeline, xl_pipeline
from lora_compose.pipelines.base import ComposePipeline
from lora_compose.pipelines.families.stable_diffusion import ComposeStableDiffusionPipeline
from lora_compose.pipelines.families.stable_diffusion_xl import ComposeStableDiffusionXLPipeline
from lora_compose.pipelines.methods import METHODS
from lora_compose.pipelines.scene import Concept

PROMPT = "a sks cat and a zwx dog"
# Several of diffusers' schedulers hand tensors to numpy in a way that numpy 2 deprecates.
NUMPY_2 = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


PLAIN = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
OURS = {"sd": ComposeStableDiffusionPipeline, "sdxl": ComposeStableDiffusionXLPipeline}
BOTH = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def family() -> str:
    """Which models, where a test does not ask for both."""
    return "sd"


@pytest.fixture
def pipe(family) -> Any:
    """A still smaller pipeline than the common one."""
    return FAMILIES[family]()


@pytest.fixture
def plain_pipe(family) -> Any:
    """diffusers' own pipeline with the same weights as `pipe`."""
    return FAMILIES[family](PLAIN[family])


@pytest.fixture
def load_concepts(write_lora) -> Callable[[Any], None]:
    """Loads the concepts "cat" and "dog" into a small pipeline."""

    def load(pipe: Any) -> None:
        for seed, (name, trigger) in enumerate({"cat": "sks", "dog": "zwx"}.items()):
            path = write_lora(name, unet=random_lora(pipe.unet, seed), metadata={"method": "tara"})
            pipe.load_concept(path, trigger=trigger, class_word=name)

    return load


@pytest.fixture
def composer(pipe, load_concepts) -> Any:
    """A small pipeline with the concepts "cat" and "dog"."""
    load_concepts(pipe)
    return pipe


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(rows: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, 4, 16, 16, generator=seeded(seed))


def embeddings(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, 32, 24, generator=seeded(seed))


def run(pipe: Any, **arguments: Any) -> Any:
    given = {"prompt": PROMPT, "num_inference_steps": 2, "output_type": "latent", "generator": seeded()}
    return pipe(**given | arguments)


def as_tensor(images: Any) -> Tensor:
    return images if isinstance(images, Tensor) else torch.from_numpy(np.stack([np.asarray(image) for image in images]))


def same_bits(one: Any, other: Any) -> bool:
    return torch.equal(as_tensor(one), as_tensor(other)) and as_tensor(one).dtype == as_tensor(other).dtype


def assert_close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def halve_latents(pipe, step, timestep, tensors):
    return {"latents": tensors["latents"] * 0.5}


def less_guidance_after_the_first_step(pipe, step, timestep, tensors):
    pipe._guidance_scale = 2.0
    return tensors


def no_guidance_after_the_first_step(pipe, step, timestep, tensors):
    if step == 0:
        pipe._guidance_scale = 1.0
        return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[-1]}
    return {}


# Every value builds the arguments anew, since generators are used up.
ARGUMENTS: dict[str, Callable[[], dict[str, Any]]] = {
    "defaults": dict,
    "negative prompt": lambda: {"negative_prompt": "blurry"},
    "prompts": lambda: {"prompt": [PROMPT, "a cat"], "negative_prompt": ["blurry", "dark"]},
    "images per prompt": lambda: {"prompt": [PROMPT, "a cat"], "num_images_per_prompt": 2},
    "generators": lambda: {"num_images_per_prompt": 2, "generator": [seeded(1), seeded(2)]},
    "guidance 1": lambda: {"guidance_scale": 1.0},
    "guidance 0": lambda: {"guidance_scale": 0.0},
    "guidance rescale": lambda: {"guidance_rescale": 0.7},
    "eta": lambda: {"eta": 0.8},
    "size": lambda: {"height": 64, "width": 96},
    "latents": lambda: {"latents": noise(1)},
    "embeddings": lambda: {
        "prompt": None, "prompt_embeds": embeddings(2, 1), "negative_prompt_embeds": embeddings(2, 2),
    },
    "callback that changes latents": lambda: {"callback_on_step_end": halve_latents},
    "callback that switches guidance off": lambda: {
        "callback_on_step_end": no_guidance_after_the_first_step,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    },
    "callback that lowers guidance": lambda: {"callback_on_step_end": less_guidance_after_the_first_step},
    "diffusers' callback": lambda: {
        "num_inference_steps": 3,
        "callback_on_step_end": SDCFGCutoffCallback(cutoff_step_ratio=0.0),
    },
    "pil": lambda: {"output_type": "pil"},
    "np": lambda: {"output_type": "np"},
    "pt": lambda: {"output_type": "pt"},
    "one step": lambda: {"num_inference_steps": 1},
    "scale": lambda: {"cross_attention_kwargs": {"scale": 0.5}},
    "no concepts": lambda: {},
}  # fmt: skip

XL_EMBEDDINGS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")


def xl_embeddings(rows: int) -> dict[str, Any]:
    shapes = ((rows, 32, 24), (rows, 32, 24), (rows, 12), (rows, 12))
    drawn = (torch.randn(*shape, generator=seeded(k)) for k, shape in enumerate(shapes))
    return {"prompt": None, **dict(zip(XL_EMBEDDINGS, drawn, strict=True))}


def no_guidance_for_xl(pipe, step, timestep, tensors):
    if step == 0:
        pipe._guidance_scale = 1.0
        return {name: tensors[name].chunk(2)[-1] for name in ("prompt_embeds", "add_text_embeds", "add_time_ids")}
    return {}


XL_ARGUMENTS: dict[str, Callable[[], dict[str, Any]]] = {
    **ARGUMENTS,
    "embeddings": lambda: xl_embeddings(2),
    "callback that switches guidance off": lambda: {
        "callback_on_step_end": no_guidance_for_xl,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds", "add_text_embeds", "add_time_ids"],
    },
    "diffusers' callback": lambda: {
        "num_inference_steps": 3,
        "callback_on_step_end": SDXLCFGCutoffCallback(cutoff_step_ratio=0.0),
    },
    "second prompt": lambda: {"prompt_2": "sks and dog", "negative_prompt": "dark", "negative_prompt_2": "blurry"},
    "empty negative prompt": lambda: {"negative_prompt": ""},
    "sizes": lambda: {"original_size": (64, 32), "crops_coords_top_left": (8, 16), "target_size": (64, 96)},
    "negative sizes": lambda: {
        "negative_original_size": (64, 32), "negative_crops_coords_top_left": (3, 4), "negative_target_size": (32, 16),
        "num_images_per_prompt": 1,
    },
    "end": lambda: {"denoising_end": 0.7, "num_inference_steps": 5},
}  # fmt: skip
CASES = [*(("sd", case) for case in ARGUMENTS), *(("sdxl", case) for case in XL_ARGUMENTS)]


def arguments_of(family: str, case: str) -> dict[str, Any]:
    return (ARGUMENTS if family == "sd" else XL_ARGUMENTS)[case]()


SCHEDULERS: dict[str, tuple[Callable[[Any], Any], dict[str, Any]]] = {
    "DPM": (DPMSolverMultistepScheduler.from_config, {}),
    "Euler": (EulerDiscreteScheduler.from_config, {}),
    "Euler with sigmas": (EulerDiscreteScheduler.from_config, {"sigmas": [14.0, 3.0, 0.5]}),
    "Euler ancestral": (EulerAncestralDiscreteScheduler.from_config, {}),
    "Heun": (HeunDiscreteScheduler.from_config, {}),
    "LCM": (LCMScheduler.from_config, {"guidance_scale": 1.0}),
    "PNDM": (partial(PNDMScheduler.from_config, skip_prk_steps=True), {}),
    "UniPC": (UniPCMultistepScheduler.from_config, {}),
    "DDPM with timesteps": (DDPMScheduler.from_config, {"timesteps": [900, 500, 10]}),
}


@pytest.mark.parametrize(("family", "case"), CASES)
def test_without_concepts_the_result_is_that_of_diffusers_to_the_bit(pipe, plain_pipe, family, case):
    results = [run(each, **arguments_of(family, case)).images for each in (pipe, plain_pipe)]
    assert same_bits(*results)


@pytest.mark.parametrize("concepts", [None, [], ()])
def test_no_concepts_and_an_empty_list_are_the_same(pipe, plain_pipe, concepts):
    assert same_bits(run(pipe, concepts=concepts).images, run(plain_pipe).images)


@NUMPY_2
@pytest.mark.parametrize("case", SCHEDULERS)
def test_without_concepts_every_scheduler_gives_the_bits_of_diffusers(pipe, plain_pipe, case):
    scheduler, arguments = SCHEDULERS[case]
    results = []
    for each in (pipe, plain_pipe):
        each.scheduler = scheduler(each.scheduler.config)
        results.append(run(each, num_inference_steps=3, **arguments).images)
    assert same_bits(*results)


# A concept of weight 0 goes through our own loop and must change nothing.
NOTHING: dict[str, Any] = {"concepts": [Concept(name="cat", trigger="", weight=0.0)], "method": "merge"}


@pytest.mark.parametrize(("family", "case"), CASES)
def test_with_concepts_every_argument_means_what_it_means_in_diffusers(composer, plain_pipe, family, case):
    images = run(composer, **NOTHING | arguments_of(family, case)).images
    expected = run(plain_pipe, **arguments_of(family, case)).images
    torch.testing.assert_close(as_tensor(images), as_tensor(expected), atol=1 if case == "pil" else 1e-4, rtol=0)


@NUMPY_2
@BOTH
@pytest.mark.parametrize("case", SCHEDULERS)
def test_with_concepts_every_scheduler_does_what_it_does_in_diffusers(composer, plain_pipe, case):
    scheduler, arguments = SCHEDULERS[case]
    results = []
    for each, more in ((composer, NOTHING), (plain_pipe, {})):
        each.scheduler = scheduler(each.scheduler.config)
        results.append(run(each, num_inference_steps=3, **more, **arguments).images)
    assert_close(*results)


SCHEDULES: dict[str, tuple[Any, dict[str, list[float]], int]] = {
    "DDPM": (DDPMScheduler, {"timesteps": [900, 500, 10]}, 3),
    "Euler": (EulerDiscreteScheduler, {"sigmas": [14.0, 3.0, 0.5]}, 2),
    "Heun": (HeunDiscreteScheduler, {"timesteps": [900, 500, 10]}, 3),
}


@NUMPY_2
@BOTH
@pytest.mark.parametrize("case", SCHEDULES)
def test_given_timesteps_or_noise_levels_need_no_number_of_steps(composer, plain_pipe, capsys, case):
    scheduler, schedule, steps = SCHEDULES[case]
    composer.set_progress_bar_config(disable=False)
    results = []
    for each, more in ((composer, {}), (composer, NOTHING), (plain_pipe, {})):
        each.scheduler = scheduler.from_config(each.scheduler.config)
        capsys.readouterr()
        results.append(run(each, num_inference_steps=None, **schedule, **more).images)
        if more:
            assert f"{steps}/{steps}" in capsys.readouterr().err
    plain, composed, expected = results
    assert same_bits(plain, expected)
    assert_close(composed, expected)


@NUMPY_2
@pytest.mark.parametrize("scheduler", [DDPMScheduler, HeunDiscreteScheduler])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_does_with_given_timesteps_what_it_does_with_their_number(composer, method, scheduler):
    regions = {"cat": (0, 0, 64, 128), "dog": (64, 0, 128, 128)}
    given = {"concepts": [Concept(name=name, region=box) for name, box in regions.items()], "method": method}
    composer.scheduler = scheduler.from_config(composer.scheduler.config)
    expected = run(composer, num_inference_steps=4, record_attention=[1], **given)
    timesteps = list(dict.fromkeys(composer.scheduler.timesteps.tolist()))
    assert len(timesteps) == 4
    found = run(composer, num_inference_steps=None, timesteps=timesteps, record_attention=[1], **given)
    assert same_bits(found.images, expected.images)
    assert same_bits(found.attention_maps, expected.attention_maps)
    for rows in ("rows_forward", "rows_stopped", "rows_backward"):
        assert getattr(found.cost, rows) == getattr(expected.cost, rows)


@NUMPY_2
@pytest.mark.parametrize("family", ["sdxl"])
def test_the_progress_bar_ends_where_denoising_ends(composer, capsys):
    composer.set_progress_bar_config(disable=False)
    composer.scheduler = HeunDiscreteScheduler.from_config(composer.scheduler.config)
    run(composer, num_inference_steps=6, denoising_end=0.5, **NOTHING)
    assert "3/3" in capsys.readouterr().err


@pytest.mark.parametrize("changes", [{"time_cond_proj_dim": 8}, {"sample_size": (8, 12)}], ids=str)
def test_other_kinds_of_unets_work_as_in_diffusers(load_concepts, changes):
    pipe, plain_pipe = (
        small_pipeline(kind, sd_unet(**TINY | changes))
        for kind in (ComposeStableDiffusionPipeline, StableDiffusionPipeline)
    )
    load_concepts(pipe)
    expected = run(plain_pipe).images
    output = run(pipe, **NOTHING)
    assert_close(output.images, expected)
    assert output.cost.rows_forward == (2 if "time_cond_proj_dim" in changes else 4)
    assert same_bits(run(pipe).images, expected)


@pytest.mark.parametrize("threshold", [-1.0, 1.0])
def test_the_safety_checker_has_its_say(composer, plain_pipe, threshold):
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(vision_config=vision | {"image_size": 32, "patch_size": 16}, projection_dim=8)
    checker = StableDiffusionSafetyChecker(config).eval()
    checker.special_care_embeds_weights.data.fill_(1.0)
    checker.concept_embeds_weights.data.fill_(threshold)
    results = []
    for each, more in ((composer, NOTHING), (plain_pipe, {})):
        each.register_modules(safety_checker=checker, feature_extractor=CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        ))  # fmt: skip
        results.append(run(each, output_type="np", num_images_per_prompt=2, **more))
    assert results[0].nsfw_content_detected == results[1].nsfw_content_detected == [threshold < 0] * 2
    assert_close(torch.from_numpy(results[0].images), torch.from_numpy(results[1].images))


@torch.no_grad()
def without_last_layers(encoder: Any, tokens: Tensor, skipped: int) -> Tensor:
    """What a text encoder that lacks its last layers gives, before its final layer norm. Shape: [1, tokens, width]."""
    shorter = copy.deepcopy(encoder)
    model = getattr(shorter, "text_model", shorter)
    model.encoder.layers = model.encoder.layers[: len(model.encoder.layers) - skipped]
    found = []
    model.encoder.register_forward_hook(lambda module, inputs, output: found.append(output.last_hidden_state))
    shorter(tokens)
    return found[0]


def tokens_of(tokenizer: Any) -> Tensor:
    return tokenizer(PROMPT, padding="max_length", return_tensors="pt").input_ids


@pytest.mark.parametrize("concepts", [{}, NOTHING], ids=["plain", "concepts"])
def test_clip_skip_leaves_out_the_last_layers_of_the_text_encoder(composer, plain_pipe, concepts):
    encoder = plain_pipe.text_encoder
    text = encoder.final_layer_norm(without_last_layers(encoder, tokens_of(plain_pipe.tokenizer), 1)).detach()
    _, negative = plain_pipe.encode_prompt("", torch.device("cpu"), 1, True)
    expected = run(plain_pipe, prompt=None, prompt_embeds=text, negative_prompt_embeds=negative).images
    skipped = run(composer, clip_skip=1, **concepts).images
    assert_close(skipped, expected)
    assert (skipped - run(plain_pipe).images).abs().max() > 0.01
    assert not hasattr(composer.text_encoder, "text_model")


@pytest.mark.parametrize("family", ["sdxl"])
@pytest.mark.parametrize("concepts", [{}, NOTHING], ids=["plain", "concepts"])
def test_clip_skip_leaves_out_one_layer_more_of_both_text_encoders_of_sdxl(composer, plain_pipe, concepts):
    parts = [
        without_last_layers(encoder, tokens_of(tokenizer), 2)  # SDXL leaves out one always
        for encoder, tokenizer in (
            (plain_pipe.text_encoder, plain_pipe.tokenizer), (plain_pipe.text_encoder_2, plain_pipe.tokenizer_2),
        )
    ]  # fmt: skip
    _, negative, pooled, negative_pooled = plain_pipe.encode_prompt(PROMPT)
    encoded = zip(XL_EMBEDDINGS, (torch.cat(parts, dim=-1), negative, pooled, negative_pooled), strict=True)
    expected = run(plain_pipe, prompt=None, **dict(encoded)).images
    assert_close(run(composer, clip_skip=1, **concepts).images, expected)
    assert same_bits(run(composer, clip_skip=1).images, run(plain_pipe, clip_skip=1).images)


class _WithInnerModel(CLIPTextModel):
    """A text model that has the name by which diffusers finds the final layer norm, as those of transformers 4 have."""

    @property
    def text_model(self):
        return self


def test_clip_skip_gives_the_bits_of_diffusers_where_that_finds_the_final_layer_norm(pipe, plain_pipe):
    for each in (pipe, plain_pipe):
        weights = each.text_encoder.state_dict()
        each.text_encoder = _WithInnerModel(each.text_encoder.config).eval()
        each.text_encoder.load_state_dict(weights)
    assert same_bits(run(pipe, clip_skip=1).images, run(plain_pipe, clip_skip=1).images)


@BOTH
def test_calls_with_concepts_leave_plain_calls_as_they_were(composer, plain_pipe):
    expected = run(plain_pipe).images
    for method in ("merge", "tara"):
        assert not same_bits(run(composer, concepts=["cat", "dog"], method=method).images, expected)
        assert same_bits(run(composer).images, expected)


def test_failed_calls_leave_plain_calls_as_they_were(composer, plain_pipe):
    def fail(pipe, step, timestep, tensors):
        raise ZeroDivisionError

    for arguments in ({}, {"concepts": ["cat", "dog"], "method": "tara"}, {"concepts": ["cat"], "method": "merge"}):
        with pytest.raises(ZeroDivisionError):
            run(composer, callback_on_step_end=fail, **arguments)
        assert same_bits(run(composer).images, run(plain_pipe).images)


@BOTH
def test_plain_calls_with_adapters_of_the_user_give_the_bits_of_diffusers(composer, plain_pipe, write_lora):
    path = write_lora("style", unet=random_lora(plain_pipe.unet, 7))
    for each in (composer, plain_pipe):
        each.load_lora_weights(path, adapter_name="style")
        each.set_adapters("style", 0.6)
    for scale in (1.0, 0.5):
        arguments = {"cross_attention_kwargs": {"scale": scale}}
        assert same_bits(run(composer, **arguments).images, run(plain_pipe, **arguments).images)


# What a diffusers pipeline is expected to do


@BOTH
def test_the_signature_is_that_of_diffusers_and_more(family):
    ours = inspect.signature(OURS[family].__call__).parameters
    theirs = inspect.signature(PLAIN[family].__call__).parameters
    positional = [name for name, p in theirs.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [name for name, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD] == positional
    for name in positional:
        ours_default, theirs_default = ours[name].default, theirs[name].default
        if name == "callback_on_step_end_tensor_inputs":
            ours_default = list(ours_default)
        if name not in ("self", "prompt"):
            assert ours_default == theirs_default, name
    added = ours.keys() - theirs.keys()
    assert added == {"concepts", "method", "control", "token_positions", "record_attention"}
    assert all(ours[name].kind is inspect.Parameter.KEYWORD_ONLY for name in added)


def test_all_arguments_can_be_given_by_position(pipe, plain_pipe):
    def call(each):
        return each(
            PROMPT, 64, 64, 2, None, None, 3.0, "dark", 1, 0.0, seeded(), None, None, None, None, None, "latent"
        ).images

    assert same_bits(call(pipe), call(plain_pipe))


def tiny_vae(**config: Any) -> Any:
    channels, layers = (8,) * 4, (1,) * 4
    return AutoencoderTiny(
        encoder_block_out_channels=channels, decoder_block_out_channels=channels, num_encoder_blocks=layers,
        num_decoder_blocks=layers, **config,
    )  # fmt: skip


def asymmetric_vae() -> Any:
    return AsymmetricAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, down_block_out_channels=(8,) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, up_block_out_channels=(8,) * 4, norm_num_groups=4,
    )  # fmt: skip


def consistency_vae() -> Any:
    return ConsistencyDecoderVAE(
        encoder_block_out_channels=(8,) * 4, encoder_down_block_types=("DownEncoderBlock2D",) * 4,
        encoder_layers_per_block=1, encoder_norm_num_groups=4, encoder_double_z=True,
        decoder_block_out_channels=(8, 8), decoder_down_block_types=("ResnetDownsampleBlock2D",) * 2,
        decoder_up_block_types=("ResnetUpsampleBlock2D",) * 2, decoder_layers_per_block=1,
        decoder_norm_num_groups=4,
    )  # fmt: skip


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", [tiny_vae, asymmetric_vae, consistency_vae])
def test_every_kind_of_vae_decodes_as_in_diffusers(composer, plain_pipe, family, kind, dtype):
    torch.manual_seed(0)
    vae = kind().eval()
    results = []
    for each, more in ((composer, {}), (composer, NOTHING), (plain_pipe, {})):
        each.vae = vae
        each.to(dtype=dtype)
        torch.manual_seed(1)  # diffusers' SDXL gives a VAE that draws no generator
        results.append(run(each, num_inference_steps=1, output_type="np", **more).images)
    plain, composed, expected = results
    assert same_bits(plain, expected)
    if kind is consistency_vae and family == "sdxl":  # with concepts it has drawn from the call's generator
        assert np.isfinite(composed).all()
    else:
        assert_close(torch.from_numpy(composed), torch.from_numpy(expected))


@BOTH
def test_a_vae_that_draws_takes_the_generator_of_a_call_with_concepts(composer):
    composer.vae = consistency_vae().eval()
    state = torch.get_rng_state()
    first, again = (run(composer, num_inference_steps=1, output_type="np", **NOTHING).images for _ in range(2))
    assert same_bits(first, again)
    assert torch.equal(torch.get_rng_state(), state)


def test_unknown_arguments_are_refused_with_concepts(composer):
    with pytest.raises(TypeError, match="unknown arguments: stepz"):
        run(composer, concepts=["cat"], stepz=3)


def test_components_are_those_of_diffusers_and_build_the_pipeline_again(composer, plain_pipe):
    assert composer.components.keys() == plain_pipe.components.keys()
    again = ComposeStableDiffusionPipeline(**composer.components, requires_safety_checker=False)
    assert all(again.components[name] is part for name, part in composer.components.items())
    assert same_bits(run(again).images, run(plain_pipe).images)


@BOTH
def test_class_attributes_that_diffusers_reads_are_inherited(family):
    for name in (
        "model_cpu_offload_seq",
        "_optional_components",
        "_exclude_from_cpu_offload",
        "_callback_tensor_inputs",
    ):
        assert getattr(OURS[family], name) == getattr(PLAIN[family], name)


@BOTH
def test_what_is_saved_opens_in_plain_diffusers_and_again_in_ours(composer, family, tmp_path):
    composer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "model_index.json").read_text())
    plain, ours = PLAIN[family], OURS[family]
    assert config["_class_name"] == plain.__name__
    expected = run(composer).images
    for opener, kind in ((plain, plain), (DiffusionPipeline, plain), (ComposePipeline, ours), (ours, ours)):
        opened = opener.from_pretrained(tmp_path, local_files_only=True)
        opened.set_progress_bar_config(disable=True)
        assert type(opened) is kind
        assert same_bits(run(opened).images, expected)


@BOTH
def test_what_is_saved_is_what_diffusers_saves(composer, plain_pipe, tmp_path):
    composer.save_pretrained(tmp_path / "ours")
    plain_pipe.save_pretrained(tmp_path / "plain")
    files = {p.relative_to(tmp_path / "plain") for p in (tmp_path / "plain").rglob("*") if p.is_file()}
    assert files == {p.relative_to(tmp_path / "ours") for p in (tmp_path / "ours").rglob("*") if p.is_file()}
    for name in files:
        ours, plain = ((tmp_path / side / name).read_bytes() for side in ("ours", "plain"))
        assert json.loads(ours) == json.loads(plain) if name.suffix == ".json" else ours == plain


@BOTH
def test_a_reopened_model_composes_as_the_first_one_did(composer, load_concepts, tmp_path):
    composer.save_pretrained(tmp_path / "model")
    opened = ComposePipeline.from_pretrained(tmp_path / "model")
    opened.set_progress_bar_config(disable=True)
    load_concepts(opened)
    arguments = {"concepts": ["cat", "dog"], "method": "tara"}
    assert same_bits(run(opened, **arguments).images, run(composer, **arguments).images)


def test_loading_options_of_diffusers_are_passed_on(composer, tmp_path):
    composer.save_pretrained(tmp_path, variant="small")
    opened = ComposePipeline.from_pretrained(
        tmp_path, variant="small", dtype=torch.bfloat16, scheduler=EulerDiscreteScheduler(steps_offset=1)
    )
    assert opened.unet.dtype == opened.vae.dtype == opened.text_encoder.dtype == torch.bfloat16
    assert type(opened.scheduler) is EulerDiscreteScheduler
    with pytest.raises(OSError, match=r"diffusion_pytorch_model|model\.safetensors"):
        ComposePipeline.from_pretrained(tmp_path, variant=None)


def test_components_that_are_missing_stay_missing(composer, tmp_path):
    composer.save_pretrained(tmp_path)
    opened = ComposePipeline.from_pretrained(tmp_path)
    assert opened.safety_checker is opened.feature_extractor is opened.image_encoder is None
    assert opened.config.requires_safety_checker is False
    without = ComposePipeline.from_pretrained(tmp_path, text_encoder=None, tokenizer=None)
    assert without.text_encoder is without.tokenizer is None


@BOTH
def test_precision_follows_to(composer):
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        composer.to(dtype=dtype)
        assert composer.dtype == composer.unet.dtype == composer.text_encoder.dtype == dtype
        for arguments in ({}, {"concepts": ["cat", "dog"], "method": "tara"}, {"concepts": ["cat"], "method": "merge"}):
            latents = run(composer, **arguments).images
            assert latents.dtype == dtype
            assert torch.isfinite(latents).all()


def test_double_precision_agrees_with_single_precision(composer):
    for method in ("merge", "tara"):
        arguments = {"concepts": ["cat", "dog"], "method": method, "latents": noise(1)}
        single = run(composer.to(dtype=torch.float32), **arguments).images
        double = run(composer.to(dtype=torch.float64), **arguments | {"latents": noise(1).double()}).images
        torch.testing.assert_close(single.double(), double, atol=1e-4, rtol=0)
        assert not torch.equal(single.double(), double)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("opener", [ComposePipeline, None])
@BOTH
def test_a_pipeline_made_from_another_shares_its_modules_and_keeps_their_precision(plain_pipe, family, opener, dtype):
    plain_pipe.to(dtype=dtype)
    expected = run(plain_pipe).images
    made = (opener or OURS[family]).from_pipe(plain_pipe)
    assert type(made) is OURS[family]
    assert all(made.components[name] is part for name, part in plain_pipe.components.items())
    assert made.dtype == plain_pipe.dtype == dtype
    assert same_bits(run(made).images, expected)
    assert same_bits(run(plain_pipe).images, expected)


@BOTH
def test_a_plain_pipeline_can_be_made_from_ours(composer, plain_pipe, family):
    made = PLAIN[family].from_pipe(composer)
    made.set_progress_bar_config(disable=True)
    assert type(made) is PLAIN[family]
    assert made.unet is composer.unet
    assert same_bits(run(made).images, run(plain_pipe).images)


AUTO = {
    AutoPipelineForText2Image: {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline},
    AutoPipelineForImage2Image: {"sd": StableDiffusionImg2ImgPipeline, "sdxl": StableDiffusionXLImg2ImgPipeline},
    AutoPipelineForInpainting: {"sd": StableDiffusionInpaintPipeline, "sdxl": StableDiffusionXLInpaintPipeline},
}


@BOTH
@pytest.mark.parametrize("task", AUTO, ids=lambda task: task.__name__)
def test_diffusers_finds_the_pipelines_for_other_tasks_from_ours_and_the_way_back(composer, plain_pipe, family, task):
    made = task.from_pipe(composer)
    assert type(made) is AUTO[task][family]
    assert made.unet is composer.unet
    again = ComposePipeline.from_pipe(made)
    again.set_progress_bar_config(disable=True)
    assert type(again) is OURS[family]
    assert again.unet is composer.unet
    assert same_bits(run(again).images, run(plain_pipe).images)


def test_an_extended_class_has_the_name_of_the_pipeline_of_diffusers(family):
    class Mixed:
        pass

    class Extended(Mixed, OURS[family]):
        pass

    assert Extended.__name__ == PLAIN[family].__name__
    assert Extended.__qualname__.endswith("Extended")


def test_from_pipe_takes_other_components_and_precisions(plain_pipe):
    scheduler = EulerDiscreteScheduler(steps_offset=1)
    made = ComposePipeline.from_pipe(plain_pipe, scheduler=scheduler, dtype=torch.bfloat16)
    assert made.scheduler is scheduler
    assert made.dtype == torch.bfloat16


@BOTH
def test_from_pipe_refuses_to_change_one_of_several_precisions_unasked(plain_pipe):
    plain_pipe.vae.to(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"differ in precision.*\*\*pipe.components"):
        ComposePipeline.from_pipe(plain_pipe)
    assert plain_pipe.vae.dtype == torch.bfloat16
    assert plain_pipe.unet.dtype == torch.float32


def test_models_of_other_families_are_refused_by_name(tmp_path):
    config = {"_class_name": "PixArtAlphaPipeline", "transformer": ["diffusers", "PixArtTransformer2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"PixArtAlphaPipeline; supported are Stable Diffusion 1\.x, 2\.x and XL"):
        ComposePipeline.from_pretrained(tmp_path)


def test_the_refiner_is_refused_by_name(tmp_path):
    base = tiny_xl_pipeline()
    parts = {**base.components, "text_encoder": None, "tokenizer": None}
    refiner = StableDiffusionXLImg2ImgPipeline(**parts, requires_aesthetics_score=True, add_watermarker=False)
    refiner.save_pretrained(tmp_path / "refiner")
    for opening in (
        lambda: ComposePipeline.from_pretrained(tmp_path / "refiner"),
        lambda: ComposePipeline.from_pipe(refiner),
    ):
        with pytest.raises(ValueError, match=r"this is SDXL's refiner.*open the base model"):
            opening()


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(OSError, match=r"model_index\.json"):
        ComposePipeline.from_pretrained(tmp_path)


# What encodes and what calls back


def test_encoded_prompts_give_the_bits_of_the_prompts(pipe, plain_pipe):
    positive, negative = pipe.encode_prompt(PROMPT, torch.device("cpu"), 1, True, "dark")
    encoded = {"prompt": None, "prompt_embeds": positive, "negative_prompt_embeds": negative}
    assert same_bits(run(pipe, **encoded).images, run(plain_pipe, negative_prompt="dark").images)


def test_encoding_needs_the_text_parts_only_and_denoising_the_others(composer):
    names = ("text_encoder", "tokenizer")
    nothing: dict[str, Any] = dict.fromkeys(composer.components)
    text = ComposeStableDiffusionPipeline(
        **nothing | {name: composer.components[name] for name in names}, requires_safety_checker=False
    )
    positive, negative = text.encode_prompt(PROMPT, torch.device("cpu"), 1, True)
    image = ComposeStableDiffusionPipeline(**composer.components | dict.fromkeys(names), requires_safety_checker=False)
    image.set_progress_bar_config(disable=True)
    encoded = {"prompt": None, "prompt_embeds": positive, "negative_prompt_embeds": negative}
    assert same_bits(run(image, **encoded).images, run(composer).images)


@BOTH
def test_dict_and_tuple_hold_the_same(pipe, family):
    output = run(pipe, output_type="np")
    images, *nsfw = run(pipe, output_type="np", return_dict=False)
    assert same_bits(output.images, images)
    assert same_bits(output[0], images)
    assert same_bits(output["images"], images)
    assert nsfw == ([None] if family == "sd" else [])


SHAPES = {
    "sd": {"latents": (1, 4, 16, 16), "prompt_embeds": (2, 32, 24), "negative_prompt_embeds": (1, 32, 24)},
    "sdxl": {
        "latents": (1, 4, 16, 16), "prompt_embeds": (2, 32, 24), "add_text_embeds": (2, 12), "add_time_ids": (2, 6),
    },
}  # fmt: skip


@BOTH
@pytest.mark.parametrize("concepts", [None, ["cat", "dog"]])
def test_callbacks_are_given_every_tensor_that_diffusers_names(composer, family, concepts):
    seen = []

    def look(pipe, step, timestep, tensors):
        seen.append((step, int(timestep), {name: value.shape for name, value in tensors.items()}))
        return tensors

    names = composer._callback_tensor_inputs
    run(composer, concepts=concepts, callback_on_step_end=look, callback_on_step_end_tensor_inputs=names)
    assert [step for step, _, _ in seen] == [0, 1]
    assert [timestep for _, timestep, _ in seen] == composer.scheduler.timesteps.tolist()
    assert all(tensors == SHAPES[family] for _, _, tensors in seen)


@pytest.mark.parametrize("concepts", [None, ["cat", "dog"]])
def test_callbacks_may_name_only_tensors_that_there_are(composer, concepts):
    with pytest.raises(ValueError, match=r"callback_on_step_end_tensor_inputs.*noise_pred"):
        run(composer, concepts=concepts, callback_on_step_end_tensor_inputs=["noise_pred"])


@pytest.mark.parametrize("concepts", [None, ["cat", "dog"]])
def test_the_properties_that_other_code_reads_are_set_during_a_call(composer, concepts):
    def look(pipe, step, timestep, tensors):
        assert pipe.guidance_scale == 3.5
        assert pipe.guidance_rescale == 0.25
        assert pipe.do_classifier_free_guidance
        assert pipe.num_timesteps == 2
        assert pipe.clip_skip is None
        assert pipe.cross_attention_kwargs == {"scale": 0.5}
        assert pipe.interrupt is False
        return tensors

    run(
        composer, concepts=concepts, guidance_scale=3.5, guidance_rescale=0.25, cross_attention_kwargs={"scale": 0.5},
        callback_on_step_end=look,
    )  # fmt: skip


@NUMPY_2
@pytest.mark.parametrize("concepts", [None, ["cat", "dog"]])
def test_the_progress_bar_counts_steps_not_calls(composer, capsys, concepts):
    composer.set_progress_bar_config(disable=False)
    for scheduler, steps in (
        (composer.scheduler, 3),
        (HeunDiscreteScheduler.from_config(composer.scheduler.config), 3),
    ):
        composer.scheduler = scheduler
        run(composer, concepts=concepts, num_inference_steps=steps)
        assert f"{steps}/{steps}" in capsys.readouterr().err


# A checkpoint in one file

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
VAE = {
    "mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2", "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut", "downsamplers.0": "downsample", "upsamplers.0": "upsample", "resnets": "block",
}  # fmt: skip


OPEN_CLIP = {
    "self_attn": "attn", "layer_norm1": "ln_1", "layer_norm2": "ln_2", "fc1": "c_fc", "fc2": "c_proj",
    "text_model.encoder.layers": "transformer.resblocks", "text_model.final_layer_norm": "ln_final",
    "text_model.embeddings.token_embedding": "token_embedding",
}  # fmt: skip


def original_unet_names(unet: Any) -> dict[str, str]:
    """What Stable Diffusion's own code calls the parts of a UNet with levels of two layers."""
    names = {
        "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
        "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }  # fmt: skip
    for i, up in enumerate(unet.up_blocks):
        for j in range(3):
            names[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{3 * i + j + 1}.0"
            names[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{3 * i + j + 1}.1"
            names[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{3 * i + j}.0"
            names[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{3 * i + j}.1"
        names[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{3 * i + 3}.0.op"
        names[f"up_blocks.{i}.upsamplers.0"] = f"output_blocks.{3 * i + 2}.{2 if hasattr(up, 'attentions') else 1}"
    return names


def renamed(key: str, names: dict[str, str]) -> str:
    for ours, theirs in names.items():
        key = re.sub(rf"(^|\.){re.escape(ours)}(?=\.)", rf"\g<1>{theirs}", key)
    return key


def write_checkpoint(pipe: Any, path: Path) -> Path:
    """Writes the models of a pipeline as one file in the original layout."""
    tensors = {}
    for key, tensor in pipe.unet.state_dict().items():
        name = renamed(key, original_unet_names(pipe.unet))
        tensors["model.diffusion_model." + (renamed(name, RESNET) if ".resnets." in key else name)] = tensor
    for key, tensor in pipe.vae.state_dict().items():
        name = re.sub(r"up_blocks\.(\d)", lambda found: f"up.{3 - int(found[1])}", key.replace("down_blocks", "down"))
        convolution = ".attentions." in key and "group_norm" not in key and tensor.ndim == 2
        tensors["first_stage_model." + renamed(name, VAE)] = tensor[..., None, None] if convolution else tensor
    xl = hasattr(pipe, "text_encoder_2")
    first = "conditioner.embedders.0." if xl else "cond_stage_model."
    for key, tensor in pipe.text_encoder.state_dict().items():
        tensors[f"{first}transformer.text_model.{key.removeprefix('text_model.')}"] = tensor
    if xl:
        tensors |= {f"conditioner.embedders.1.model.{k}": v for k, v in open_clip(pipe.text_encoder_2).items()}
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return path


def open_clip(encoder: Any) -> dict[str, Tensor]:
    """The weights of a text encoder as OpenCLIP has them: one matrix for queries, keys and values."""
    weights = encoder.state_dict()
    tensors = {
        renamed(key, OPEN_CLIP): tensor for key, tensor in weights.items() if not re.search(r"\.[qkv]_proj\.", key)
    }
    tensors["text_projection"] = tensors.pop("text_projection.weight").T
    tensors["positional_embedding"] = tensors.pop("text_model.embeddings.position_embedding.weight")
    for i in range(encoder.config.num_hidden_layers):
        for kind in ("weight", "bias"):
            three = [weights[f"text_model.encoder.layers.{i}.self_attn.{side}_proj.{kind}"] for side in "qkv"]
            tensors[f"transformer.resblocks.{i}.attn.in_proj_{kind}"] = torch.cat(three)
    return tensors


@BOTH
@pytest.mark.parametrize("opener", [ComposePipeline, None])
def test_a_checkpoint_in_one_file_opens_like_a_folder(load_concepts, tmp_path, family, opener):
    composer = small_pipeline() if family == "sd" else xl_pipeline()
    composer.set_progress_bar_config(disable=True)
    load_concepts(composer)
    composer.save_pretrained(tmp_path / "model")
    path = write_checkpoint(composer, tmp_path / "model.safetensors")
    opened = (opener or OURS[family]).from_single_file(path, config=str(tmp_path / "model"), local_files_only=True)
    opened.set_progress_bar_config(disable=True)
    assert type(opened) is OURS[family]
    load_concepts(opened)
    for arguments in ({}, {"concepts": ["cat", "dog"], "method": "tara"}):
        assert same_bits(run(opened, **arguments).images, run(composer, **arguments).images)


def test_the_refiner_in_one_file_is_refused_before_it_is_read(tmp_path):
    key = "conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias"
    save_file({key: torch.zeros(1)}, tmp_path / "refiner.safetensors")
    with pytest.raises(ValueError, match="this is SDXL's refiner"):
        ComposePipeline.from_single_file(tmp_path / "refiner.safetensors")
