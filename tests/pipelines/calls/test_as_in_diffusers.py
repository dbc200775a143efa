"""Without concepts a call is diffusers' own to the bit, and with them every argument means what it means there."""

import copy
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderTiny,
    ConsistencyDecoderVAE,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import SDCFGCutoffCallback, SDXLCFGCutoffCallback
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPTextModel

from components import FAMILIES, TINY, sd_unet, seeded, small_pipeline
from composing import (
    BOXED,
    EMBEDDINGS,
    PLAIN,
    POSITIONS,
    PROMPT,
    as_tensor,
    assert_close,
    composer_of,
    far_apart,
    latents_of,
    lora_file,
    run,
    same_bits,
)
from lora_compose.pipelines.families.stable_diffusion import ComposeStableDiffusionPipeline
from lora_compose.pipelines.methods import METHODS
from lora_compose.pipelines.scene.scene import Concept
from pairs import slow_but


def noise(rows: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, 4, 16, 16, generator=seeded(seed))


def embeddings(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, 32, 24, generator=seeded(seed))


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
    "diffusers' callback": lambda: {"callback_on_step_end": SDCFGCutoffCallback(cutoff_step_ratio=0.0)},
    "pil": lambda: {"output_type": "pil"},
    "one step": lambda: {"num_inference_steps": 1},
    "scale": lambda: {"cross_attention_kwargs": {"scale": 0.5}},
}  # fmt: skip


def xl_embeddings(rows: int) -> dict[str, Any]:
    shapes = ((rows, 32, 24), (rows, 32, 24), (rows, 12), (rows, 12))
    drawn = (torch.randn(*shape, generator=seeded(k)) for k, shape in enumerate(shapes))
    return {"prompt": None, **dict(zip(EMBEDDINGS, drawn, strict=True))}


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
    "diffusers' callback": lambda: {"callback_on_step_end": SDXLCFGCutoffCallback(cutoff_step_ratio=0.0)},
    "second prompt": lambda: {"prompt_2": "sks and dog", "negative_prompt": "dark", "negative_prompt_2": "blurry"},
    "empty negative prompt": lambda: {"negative_prompt": ""},
    "sizes": lambda: {"original_size": (64, 32), "crops_coords_top_left": (8, 16), "target_size": (64, 96)},
    "negative sizes": lambda: {
        "negative_original_size": (64, 32), "negative_crops_coords_top_left": (3, 4), "negative_target_size": (32, 16),
        "num_images_per_prompt": 1,
    },
    "end": lambda: {"denoising_end": 0.5, "num_inference_steps": 4},
}  # fmt: skip


# Of what both families have, SDXL sees what makes rows of text and of sizes.
SHARED = ("prompts", "images per prompt", "size")
ON_XL = [case for case, make in XL_ARGUMENTS.items() if case in SHARED or ARGUMENTS.get(case) is not make]
CASES = [*(("sd", case) for case in ARGUMENTS), *(("sdxl", case) for case in ON_XL)]


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


@cache
def plain_of(family: str) -> Any:
    """diffusers' own pipeline with the weights of `composer_of`, shared."""
    return FAMILIES[family](PLAIN[family])


@pytest.mark.parametrize("concepts", [None, [], ()])
def test_no_concepts_and_an_empty_list_are_the_same(concepts):
    assert same_bits(run(composer_of("sd"), concepts=concepts).images, run(plain_of("sd")).images)


# A concept of weight 0 goes through our own loop and must change nothing.
NOTHING: dict[str, Any] = {"concepts": [Concept(name="cat", trigger="", weight=0.0)], "method": "merge"}


@pytest.mark.parametrize(("family", "case"), CASES)
def test_every_argument_means_what_it_means_in_diffusers(family, case):
    """With concepts but for rounding, and without them to the bit, also after a call with them."""
    make = (ARGUMENTS if family == "sd" else XL_ARGUMENTS)[case]
    runs = ((composer_of(family), NOTHING), (composer_of(family), {}), (plain_of(family), {}))
    composed, plain, expected = (run(pipe, **more | make()).images for pipe, more in runs)
    assert same_bits(plain, expected)
    assert_close(as_tensor(composed), as_tensor(expected), 1 if case == "pil" else 1e-4)


@pytest.mark.parametrize(
    ("family", "case"),
    [
        *(
            pytest.param("sd", case, marks=pytest.mark.slow if case in ("LCM", "UniPC") else ())
            for case in SCHEDULERS
            if case != "Euler"
        ),
        ("sdxl", "Euler"),
    ],
)
def test_every_scheduler_does_what_it_does_in_diffusers(composer, plain_pipe, case):
    scheduler, arguments = SCHEDULERS[case]
    results = []
    for each, more in ((composer, NOTHING), (composer, {}), (plain_pipe, {})):
        each.scheduler = scheduler(each.scheduler.config)
        results.append(run(each, num_inference_steps=3, **more, **arguments).images)
    composed, plain, expected = results
    assert same_bits(plain, expected)
    assert_close(composed, expected)


COUNT_STEPS = ("merge", "switch", "lora-composer", "clora", "draft")
"""One whose steps are all alike, and those that do something else at some of them."""

SCHEDULES: dict[str, tuple[Any, dict[str, list[float]], int]] = {
    "DDPM": (DDPMScheduler, {"timesteps": [900, 500, 10]}, 3),
    "Euler": (EulerDiscreteScheduler, {"sigmas": [14.0, 3.0, 0.5]}, 2),
    "Heun": (HeunDiscreteScheduler, {"timesteps": [900, 500, 10]}, 3),
}


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


@pytest.mark.parametrize("method", slow_but(COUNT_STEPS, METHODS))
def test_every_method_does_with_given_timesteps_what_it_does_with_their_number(composer, method):
    given = {"concepts": BOXED, "method": method}
    scheduler: Any = HeunDiscreteScheduler.from_config(composer.scheduler.config)
    composer.scheduler = scheduler
    expected = run(composer, num_inference_steps=3, record_attention=[1], **given)
    timesteps = list(dict.fromkeys(scheduler.timesteps.tolist()))
    assert len(timesteps) == 3
    found = run(composer, num_inference_steps=None, timesteps=timesteps, record_attention=[1], **given)
    assert same_bits(found.images, expected.images)
    assert same_bits(found.attention_maps, expected.attention_maps)
    for rows in ("rows_forward", "rows_stopped", "rows_backward"):
        assert getattr(found.cost, rows) == getattr(expected.cost, rows)


@pytest.mark.parametrize("family", ["sdxl"])
def test_the_progress_bar_ends_where_denoising_ends(composer, capsys):
    composer.set_progress_bar_config(disable=False)
    composer.scheduler = HeunDiscreteScheduler.from_config(composer.scheduler.config)
    run(composer, num_inference_steps=6, denoising_end=0.5, **NOTHING)
    assert "3/3" in capsys.readouterr().err


@pytest.mark.parametrize("changes", [{"time_cond_proj_dim": 8}, {"sample_size": (8, 12)}], ids=str)
def test_other_kinds_of_unets_work_as_in_diffusers(changes):
    pipe, plain_pipe = (
        small_pipeline(kind, sd_unet(**TINY | changes))
        for kind in (ComposeStableDiffusionPipeline, StableDiffusionPipeline)
    )
    pipe.load_concept(lora_file("sd", "cat"), "cat")
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
def test_clip_skip_leaves_out_the_last_layers_of_the_text_encoder(concepts):
    composer, plain_pipe = composer_of("sd"), plain_of("sd")
    encoder = plain_pipe.text_encoder
    text = encoder.final_layer_norm(without_last_layers(encoder, tokens_of(plain_pipe.tokenizer), 1)).detach()
    _, negative = plain_pipe.encode_prompt("", torch.device("cpu"), 1, True)
    expected = run(plain_pipe, prompt=None, prompt_embeds=text, negative_prompt_embeds=negative).images
    skipped = run(composer, clip_skip=1, **concepts).images
    assert_close(skipped, expected)
    assert (skipped - run(plain_pipe).images).abs().max() > 0.01
    assert not hasattr(composer.text_encoder, "text_model")


@pytest.mark.parametrize("concepts", [{}, NOTHING], ids=["plain", "concepts"])
def test_clip_skip_leaves_out_one_layer_more_of_both_text_encoders_of_sdxl(concepts):
    composer, plain_pipe = composer_of("sdxl"), plain_of("sdxl")
    parts = [
        without_last_layers(encoder, tokens_of(tokenizer), 2)  # SDXL leaves out one always
        for encoder, tokenizer in (
            (plain_pipe.text_encoder, plain_pipe.tokenizer), (plain_pipe.text_encoder_2, plain_pipe.tokenizer_2),
        )
    ]  # fmt: skip
    _, negative, pooled, negative_pooled = plain_pipe.encode_prompt(PROMPT)
    encoded = zip(EMBEDDINGS, (torch.cat(parts, dim=-1), negative, pooled, negative_pooled), strict=True)
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


@pytest.mark.parametrize("method", ["tara", "composite"])
def test_clip_skip_reaches_the_text_encoder(method):
    composer = composer_of("sd")
    skipped = latents_of(composer, method=method, clip_skip=1)
    positive, negative = composer.encode_prompt(PROMPT, torch.device("cpu"), 1, True, clip_skip=1)
    embeds = {"prompt": None, "prompt_embeds": positive, "negative_prompt_embeds": negative}
    assert torch.equal(skipped, latents_of(composer, method=method, token_positions=POSITIONS, **embeds))
    assert far_apart(skipped, latents_of(composer, method=method))


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


@pytest.mark.parametrize(
    ("family", "dtype", "kind"),
    [
        *(("sd", torch.float32, kind) for kind in (tiny_vae, asymmetric_vae, consistency_vae)),
        ("sdxl", torch.float16, tiny_vae),
        *(
            pytest.param("sdxl", torch.float16, kind, marks=pytest.mark.slow)
            for kind in (asymmetric_vae, consistency_vae)
        ),
    ],
)
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
    assert_close(torch.from_numpy(composed), torch.from_numpy(expected))


def test_a_vae_that_draws_takes_the_generator_of_a_call_with_concepts(composer):
    composer.vae = consistency_vae().eval()
    state = torch.get_rng_state()
    first, again = (run(composer, num_inference_steps=1, output_type="np", **NOTHING).images for _ in range(2))
    assert same_bits(first, again)
    assert torch.equal(torch.get_rng_state(), state)
