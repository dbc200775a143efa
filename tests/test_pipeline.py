"""Calls with concepts: every argument of diffusers keeps its meaning, and nothing is left behind."""

import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
)
from diffusers.callbacks import MultiPipelineCallbacks, SDCFGCutoffCallback
from diffusers.models.attention_processor import AttnProcessor
from lora_compose.pipelines.engine import Engine
from PIL import Image
from torch import Tensor, nn

from components import EVERYTHING, FAMILIES, State, random_lora, small_pipeline, text_loras, tiny_pipeline
from lora_compose.pipelines.base import ComposePipeline
from lora_compose.pipelines.concepts.loading import LoraError
from lora_compose.pipelines.families.stable_diffusion import ComposeStableDiffusionPipeline
from lora_compose.pipelines.methods import Clora, Merge, OnePass, Tara, choose_method
from lora_compose.pipelines.output import ComposeOutput
from lora_compose.pipelines.scene import Concept

PROMPT = "a sks cat and a zwx dog"
POSITIONS = {"cat": [2], "dog": [6]}
CONCEPTS = {
    "cat": "sks",
    "dog": "zwx",
    "bear": "xlo",
    "robot": "ohwx",
    "car": "qrt",
    "man": "pll",
    "tree": "vbn",
    "bag": "mjq",
}
METHODS = ("merge", "tara")
EVERY_METHOD = (*METHODS, "switch", "composite")
NUMPY_2 = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


BOTH = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def pipe(family) -> Any:
    """A still smaller pipeline than the common one."""
    return FAMILIES[family]()


@pytest.fixture
def plain_pipe() -> StableDiffusionPipeline:
    """diffusers' own pipeline with the same weights as `pipe`."""
    return tiny_pipeline(StableDiffusionPipeline)


@pytest.fixture
def load_concepts(write_lora) -> Callable[..., None]:
    """Loads concepts, each with a file of its own: `load_concepts(pipe, "cat", "dog")`."""

    def load(pipe: Any, *names: str, **options: Any) -> None:
        for name in names:
            seed = list(CONCEPTS).index(name)
            metadata = {"trigger": CONCEPTS[name], "class_word": name, "method": "tara"}
            path = write_lora(f"{name}-file", unet=random_lora(pipe.unet, seed, **options), metadata=metadata)
            pipe.load_concept(path, name)

    return load


@pytest.fixture
def composer(pipe, load_concepts) -> Any:
    """A small pipeline with the concepts "cat" and "dog"."""
    load_concepts(pipe, "cat", "dog")
    return pipe


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def compose(pipe: Any, **arguments: Any) -> Any:
    given = {
        "prompt": PROMPT, "concepts": ["cat", "dog"], "method": "tara", "num_inference_steps": 2,
        "output_type": "latent", "generator": seeded(),
    }  # fmt: skip
    return pipe(**given | arguments)


def latents_of(pipe: Any, **arguments: Any) -> Tensor:
    return compose(pipe, **arguments).images


def assert_close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def far_apart(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() > 1e-2)


# What a call must leave alone


class StoppedError(Exception):
    pass


def raise_at_step(error: type[BaseException]) -> dict[str, Any]:
    def callback(pipe, step, timestep, tensors):
        if step == 1:
            raise error
        return tensors

    return {"callback_on_step_end": callback}


@pytest.mark.parametrize("method", EVERY_METHOD)
@pytest.mark.parametrize("error", [StoppedError, KeyboardInterrupt, None])
def test_nothing_is_left_after_a_call_however_it_ends(pipe, load_concepts, write_lora, method, error):
    load_concepts(pipe, "cat", targets=EVERYTHING, size=0.1)
    text = random_lora(pipe.text_encoder, 5, targets=("q_proj", "v_proj", "fc1"))
    pipe.load_concept(write_lora("dog", unet=random_lora(pipe.unet, 1), text_encoder=text), trigger="zwx")
    pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.set_processor(AttnProcessor())
    pipe.unet.down_blocks[0].requires_grad_(False)
    pipe.unet.up_blocks[1].train()
    pipe.text_encoder.requires_grad_(False)
    before = State(pipe)
    if error is None:
        compose(pipe, method=method)
    else:
        with pytest.raises(error):
            compose(pipe, method=method, **raise_at_step(error))
    before.assert_unchanged()


@pytest.mark.parametrize(("family", "part"), [
    ("sd", "text_encoder"), ("sd", "unet"), ("sd", "vae"), ("sdxl", "text_encoder_2"), ("sdxl", "vae"),
])  # fmt: skip
@pytest.mark.parametrize("method", EVERY_METHOD)
def test_nothing_is_left_when_a_model_fails(composer, method, part):
    calls = []

    def fail(module, inputs):
        calls.append(module)
        if len(calls) == 2 or part in ("vae", "text_encoder_2"):
            raise StoppedError

    model = composer.vae.decoder if part == "vae" else getattr(composer, part)
    handle = model.register_forward_pre_hook(fail)
    before = State(composer)
    with pytest.raises(StoppedError):
        compose(composer, method=method, output_type="np")
    before.assert_unchanged()
    handle.remove()
    calls.clear()
    assert torch.isfinite(latents_of(composer, method=method)).all()


@pytest.mark.parametrize("method", METHODS)
def test_interrupt_keeps_what_there_is_and_leaves_nothing(composer, method):
    def interrupt(pipe, step, timestep, tensors):
        seen.append(tensors["latents"])
        pipe._interrupt = step == 1
        return tensors

    seen: list[Tensor] = []
    before = State(composer)
    output = compose(composer, method=method, num_inference_steps=4, callback_on_step_end=interrupt)
    assert len(seen) == 2
    assert torch.equal(output.images, seen[-1])
    assert output.cost.rows_forward == 4
    before.assert_unchanged()
    assert compose(composer, method=method, num_inference_steps=4).cost.rows_forward == 8


def test_a_call_does_not_touch_the_latents_it_is_given(composer):
    latents = torch.randn(1, 4, 16, 16, generator=seeded())
    copy = latents.clone()
    latents_of(composer, latents=latents)
    assert torch.equal(latents, copy)


def test_pipelines_that_share_a_model_do_not_meet(composer, load_concepts):
    other = ComposePipeline.from_pipe(composer)
    other.set_progress_bar_config(disable=True)
    assert other.concepts == {}
    load_concepts(other, "bear")
    here, there = {"prompt": "a sks cat", "concepts": ["cat"]}, {"prompt": "a xlo bear", "concepts": ["bear"]}
    alone = latents_of(composer, **here), latents_of(other, **there)
    assert far_apart(*alone)
    for _ in range(2):
        assert torch.equal(latents_of(composer, **here), alone[0])
        assert torch.equal(latents_of(other, **there), alone[1])
    with pytest.raises(ValueError, match="unknown concept 'cat'"):
        compose(other, **here)


@pytest.mark.parametrize("threaded", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_a_second_call_is_refused_while_the_first_one_runs_and_does_not_disturb_it(
    composer, load_concepts, threaded, shared
):
    second = ComposePipeline.from_pipe(composer) if shared else composer
    if shared:
        load_concepts(second, "cat", "dog")
    second.set_progress_bar_config(disable=True)
    arguments = {"guidance_scale": 3.0, "num_inference_steps": 3}
    expected = latents_of(composer, **arguments)
    messages = []

    def other_call():
        try:
            compose(second, guidance_scale=1.0, num_inference_steps=5)
        except RuntimeError as error:
            messages.append(str(error))

    def callback(pipe, step, timestep, tensors):
        if threaded:
            thread = threading.Thread(target=other_call)
            thread.start()
            thread.join()
        else:
            other_call()
        return tensors

    assert torch.equal(latents_of(composer, callback_on_step_end=callback, **arguments), expected)
    assert len(messages) == 3
    assert all("composing another image" in message for message in messages)
    assert torch.equal(latents_of(second, **arguments), expected)


# Arguments of diffusers


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_prompts_images_and_generators_in_one_call_equal_single_calls(composer, method):
    prompts = [PROMPT, "zwx dog, sks cat, sks"]
    together = latents_of(
        composer, method=method, prompt=prompts, negative_prompt=["dark", "blurry"], num_images_per_prompt=2,
        generator=[seeded(seed) for seed in range(4)],
    )  # fmt: skip
    assert together.shape == (4, 4, 16, 16)
    for row in range(4):
        one = latents_of(
            composer, method=method, prompt=prompts[row // 2], negative_prompt=["dark", "blurry"][row // 2],
            generator=seeded(row),
        )  # fmt: skip
        assert_close(together[row], one[0])


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_a_list_of_one_prompt_gives_the_bits_of_the_prompt(composer, method):
    assert torch.equal(latents_of(composer, method=method, prompt=[PROMPT]), latents_of(composer, method=method))


def test_one_generator_serves_all_images_in_turn(composer):
    start = torch.randn(2, 4, 16, 16, generator=seeded(3))
    drawn = latents_of(composer, num_images_per_prompt=2, generator=seeded(3))
    assert torch.equal(drawn, latents_of(composer, num_images_per_prompt=2, latents=start))


@pytest.mark.parametrize("method", EVERY_METHOD)
@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
def test_embeddings_with_positions_give_the_bits_of_the_prompt(composer, method, guidance_scale):
    arguments: dict[str, Any] = {"method": method, "guidance_scale": guidance_scale, "num_images_per_prompt": 2}
    arguments["generator"] = [seeded(1), seeded(2)]
    expected = latents_of(composer, negative_prompt="dark", **arguments)
    positive, negative = composer.encode_prompt(PROMPT, torch.device("cpu"), 1, True, "dark")
    arguments |= {"prompt": None, "prompt_embeds": positive, "negative_prompt_embeds": negative}
    arguments["generator"] = [seeded(1), seeded(2)]
    assert torch.equal(latents_of(composer, token_positions=POSITIONS, **arguments), expected)


def test_positions_can_be_given_for_each_prompt(composer):
    prompts = [PROMPT, "zwx dog, sks cat, sks"]
    expected = latents_of(composer, prompt=prompts)
    positive, negative = composer.encode_prompt(prompts, torch.device("cpu"), 1, True)
    positions = {"cat": [[2], [4, 7]], "dog": [[6], [1]]}
    embeds = {"prompt": None, "prompt_embeds": positive, "negative_prompt_embeds": negative}
    assert torch.equal(latents_of(composer, token_positions=positions, **embeds), expected)
    swapped = {"cat": [[6], [1]], "dog": [[2], [4, 7]]}
    assert far_apart(latents_of(composer, token_positions=swapped, **embeds), expected)


def test_words_after_a_textual_inversion_of_several_tokens_are_found(composer):
    composer.load_textual_inversion({"<thing>": torch.randn(3, 24, generator=seeded())})
    prompt = "a <thing> and a sks cat"  # tokens: a, three of the thing, and, a, sks, cat
    expected = latents_of(composer, prompt=prompt, concepts=["cat"])
    positive, negative = composer.encode_prompt(prompt, torch.device("cpu"), 1, True)
    embeds = {"prompt": None, "prompt_embeds": positive, "negative_prompt_embeds": negative, "concepts": ["cat"]}
    assert torch.equal(latents_of(composer, token_positions={"cat": [7]}, **embeds), expected)
    assert far_apart(latents_of(composer, token_positions={"cat": [5]}, **embeds), expected)


def test_a_pipeline_without_text_encoder_composes_from_embeddings(composer, load_concepts):
    positive, negative = composer.encode_prompt(PROMPT, torch.device("cpu"), 1, True)
    parts = composer.components | {"text_encoder": None, "tokenizer": None}
    image_only = ComposeStableDiffusionPipeline(**parts, requires_safety_checker=False)
    image_only.set_progress_bar_config(disable=True)
    load_concepts(image_only, "cat", "dog")
    for method in EVERY_METHOD:
        latents = latents_of(
            image_only, method=method, prompt=None, prompt_embeds=positive, negative_prompt_embeds=negative,
            token_positions=POSITIONS,
        )  # fmt: skip
        assert torch.equal(latents, latents_of(composer, method=method))


def test_the_text_encoder_runs_as_often_as_in_diffusers(composer, plain_pipe):
    counts = []
    for pipe, concepts in ((plain_pipe, {}), (composer, {"concepts": ["cat", "dog"], "method": "merge"})):
        calls = []
        pipe.text_encoder.register_forward_hook(lambda *call, calls=calls: calls.append(call))
        pipe(PROMPT, num_inference_steps=1, output_type="latent", **concepts)
        counts.append(len(calls))
    assert counts == [2, 2]


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_clip_skip_reaches_the_text_encoder(composer, method):
    skipped = latents_of(composer, method=method, clip_skip=1)
    positive, negative = composer.encode_prompt(PROMPT, torch.device("cpu"), 1, True, clip_skip=1)
    encoded = latents_of(
        composer, method=method, prompt=None, prompt_embeds=positive, negative_prompt_embeds=negative,
        token_positions=POSITIONS,
    )  # fmt: skip
    assert torch.equal(skipped, encoded)
    assert far_apart(skipped, latents_of(composer, method=method))


def test_callbacks_may_change_the_latents(composer):
    def add_up(pipe, step, timestep, tensors):
        return {"latents": tensors["latents"] * 0 + step + 1}

    assert torch.equal(latents_of(composer, callback_on_step_end=add_up), torch.full((1, 4, 16, 16), 2.0))


def test_several_callbacks_of_diffusers_run_in_turn(composer):
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=0.0)
    callbacks = MultiPipelineCallbacks([cutoff, SDCFGCutoffCallback(cutoff_step_ratio=1.0)])
    output = compose(composer, num_inference_steps=3, callback_on_step_end=callbacks)
    assert output.cost.rows_forward == 2 + 1 + 1
    assert torch.equal(output.images, latents_of(composer, num_inference_steps=3, callback_on_step_end=cutoff))


@pytest.mark.parametrize("name", ["prompt_embeds", "negative_prompt_embeds"])
def test_callbacks_may_not_change_the_text(composer, name):
    def change(pipe, step, timestep, tensors):
        return {name: tensors[name] * 0.5}

    before = State(composer)
    with pytest.raises(ValueError, match=f"changed {name}; with concepts it may change latents or switch guidance off"):
        compose(composer, callback_on_step_end=change, callback_on_step_end_tensor_inputs=[name])
    before.assert_unchanged()


@pytest.mark.parametrize(("kind", "check"), [
    ("pil", lambda images: all(isinstance(image, Image.Image) and image.size == (96, 64) for image in images)),
    ("np", lambda images: images.shape == (2, 64, 96, 3) and images.dtype == np.float32),
    ("pt", lambda images: images.shape == (2, 3, 64, 96)),
    ("latent", lambda images: images.shape == (2, 4, 8, 12)),
])  # fmt: skip
def test_every_output_type_and_tuples(composer, kind, check):
    arguments = {"output_type": kind, "width": 96, "height": 64, "num_images_per_prompt": 2}
    output = compose(composer, **arguments)
    assert isinstance(output, ComposeOutput)
    assert len(output.images) == 2
    assert check(output.images)
    images, nsfw = compose(composer, return_dict=False, **arguments)
    assert check(images)
    assert nsfw is output.nsfw_content_detected is None
    assert all(
        np.array_equal(np.asarray(one), np.asarray(other)) for one, other in zip(images, output.images, strict=True)
    )


def test_images_are_decoded_as_diffusers_does(composer, plain_pipe):
    latents = latents_of(composer)
    decoded = plain_pipe.vae.decode(latents / plain_pipe.vae.config.scaling_factor, return_dict=False)[0]
    expected = plain_pipe.image_processor.postprocess(decoded.detach(), output_type="np")
    assert np.array_equal(compose(composer, output_type="np").images, expected)


@BOTH
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


@pytest.mark.parametrize("method", EVERY_METHOD)
@pytest.mark.parametrize(("width", "height"), [(8, 8), (64, 96), (136, 40), (104, 72)])
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


@NUMPY_2
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("scheduler", "steps", "guidance"), [
    (LCMScheduler, 1, 1.0), (LCMScheduler, 4, 0.0), (DPMSolverMultistepScheduler, 8, 5.0),
    (EulerDiscreteScheduler, 4, 5.0), (HeunDiscreteScheduler, 3, 5.0),
])  # fmt: skip
def test_few_steps_and_other_schedulers_work(composer, method, scheduler, steps, guidance):
    composer.scheduler = scheduler.from_config(composer.scheduler.config)
    seen = []

    def count(pipe, step, timestep, tensors):
        seen.append(step)
        return tensors

    output = compose(
        composer, method=method, num_inference_steps=steps, guidance_scale=guidance, callback_on_step_end=count
    )
    calls = steps if scheduler is not HeunDiscreteScheduler else 2 * steps - 1
    assert seen == list(range(calls))
    assert output.cost.rows_forward == calls * (2 if guidance > 1 else 1)
    assert torch.isfinite(output.images).all()


def test_ip_adapter_images_are_refused(composer):
    before = State(composer)
    with pytest.raises(ValueError, match="IP-Adapter images cannot be combined with concepts"):
        compose(composer, ip_adapter_image=Image.new("RGB", (8, 8)))
    with pytest.raises(ValueError, match="IP-Adapter images cannot be combined with concepts"):
        compose(composer, ip_adapter_image_embeds=[torch.zeros(2, 1, 8)])
    before.assert_unchanged()


def test_unknown_cross_attention_kwargs_are_refused(composer):
    with pytest.raises(ValueError, match=r"cross_attention_kwargs \['gligen'\] cannot be combined.*only 'scale' can"):
        compose(composer, cross_attention_kwargs={"gligen": {}, "scale": 1.0})


# Offloading


def offload_models(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def offload_layers(pipe: Any) -> None:
    """What `enable_sequential_cpu_offload` does, with the CPU as the device that layers are brought to."""
    for model in (part for part in pipe.components.values() if isinstance(part, nn.Module)):
        cpu_offload(model, torch.device("cpu"), offload_buffers=len(model._parameters) > 0)


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("method", [*EVERY_METHOD, Tara(scope="cross_kv")])
@pytest.mark.parametrize("offload", [offload_models, offload_layers])
def test_offloaded_models_give_the_same_image_again_and_again(pipe, load_concepts, write_lora, method, offload):
    load_concepts(pipe, "cat", targets=EVERYTHING, size=0.1)
    pipe.load_concept(write_lora("dog", unet=random_lora(pipe.unet, 1), **text_loras(pipe, 5)), trigger="zwx")
    expected = latents_of(pipe, method=method), latents_of(pipe, concepts=None, method=None)
    offload(pipe)
    tree = repr(pipe.unet)
    for _ in range(2):
        assert_close(latents_of(pipe, method=method), expected[0])
        assert torch.equal(latents_of(pipe, concepts=None, method=None), expected[1])
        assert repr(pipe.unet) == tree
    with pytest.raises(StoppedError):
        compose(pipe, method=method, **raise_at_step(StoppedError))
    assert torch.equal(latents_of(pipe, concepts=None, method=None), expected[1])
    assert_close(latents_of(pipe, method=method), expected[0])


@BOTH
def test_offloaded_models_go_back_after_a_call(composer):
    offload_models(composer)
    hooks = composer._all_hooks
    compose(composer)
    assert composer._all_hooks is not hooks  # diffusers moves every model and attaches its hooks anew


# Adapters of the user


@pytest.fixture
def files(pipe, write_lora) -> dict[str, Any]:
    """LoRA files for UNet and text encoder, without metadata: "cat" and "style"."""
    found = {}
    for seed, name in enumerate(("cat", "style")):
        text = random_lora(pipe.text_encoder, 10 + seed, targets=("q_proj", "v_proj"))
        found[name] = write_lora(name, unet=random_lora(pipe.unet, seed), text_encoder=text)
    return found


def with_adapters(pipe: Any, files: dict[str, Any], weights: dict[str, float]) -> Any:
    for name in weights:
        pipe.load_lora_weights(files[name], adapter_name=name)
    pipe.set_adapters(list(weights), list(weights.values()))
    return pipe


CAT = {"prompt": "a sks cat", "concepts": [Concept(name="cat", trigger="sks")]}


@pytest.mark.parametrize("method", EVERY_METHOD)
@pytest.mark.parametrize("active", [True, False])
def test_an_adapter_named_as_concept_equals_the_loaded_file(pipe, plain_pipe, files, method, active):
    by_name = ComposePipeline.from_pipe(plain_pipe)
    by_name.set_progress_bar_config(disable=True)
    with_adapters(by_name, files, {"cat": 1.0})
    if not active:
        by_name.disable_lora()
    pipe.load_concept(files["cat"], "cat")
    before = State(by_name)
    assert_close(latents_of(by_name, method=method, **CAT), latents_of(pipe, method=method, **CAT))
    before.assert_unchanged()


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_weights_of_adapters_and_concepts_multiply(pipe, plain_pipe, files, method):
    by_name = ComposePipeline.from_pipe(plain_pipe)
    by_name.set_progress_bar_config(disable=True)
    with_adapters(by_name, files, {"cat": 0.5})
    pipe.load_concept(files["cat"], "cat")
    halved = [Concept(name="cat", trigger="sks", weight=0.5)]
    assert_close(
        latents_of(by_name, method=method, **CAT), latents_of(pipe, method=method, **CAT | {"concepts": halved})
    )
    quarter = [Concept(name="cat", trigger="sks", weight=0.25)]
    assert_close(
        latents_of(by_name, method=method, **CAT | {"concepts": halved}),
        latents_of(pipe, method=method, **CAT | {"concepts": quarter}),
    )


def test_adapters_that_are_not_named_stay_part_of_the_base(pipe, plain_pipe, files):
    with_adapters(plain_pipe, files, {"style": 0.6, "cat": 1.0})
    with_adapters(pipe, files, {"style": 0.6, "cat": 1.0})
    arguments = {"num_inference_steps": 2, "output_type": "latent", "generator": seeded()}
    expected = plain_pipe("a sks cat", **arguments).images
    before = State(pipe)
    assert_close(latents_of(pipe, method="merge", **CAT), expected)
    before.assert_unchanged()
    alone = latents_of(pipe, method="merge", **CAT | {"concepts": [Concept(name="cat", trigger="sks", weight=0.0)]})
    plain_pipe.set_adapters("style", 0.6)
    assert_close(alone, plain_pipe("a sks cat", **arguments | {"generator": seeded()}).images)


@pytest.mark.parametrize("loaded", ["file", "adapter"])
@pytest.mark.parametrize("scale", [0.5, 0.0])
def test_scale_passes_to_the_adapters_of_the_base_and_leaves_concepts_alone(pipe, plain_pipe, files, loaded, scale):
    with_adapters(plain_pipe, files, {"style": 0.6 * scale, "cat": 1.0})
    if loaded == "file":
        with_adapters(pipe, files, {"style": 0.6})
        pipe.load_concept(files["cat"], "cat")
    else:
        with_adapters(pipe, files, {"style": 0.6, "cat": 1.0})
    before = State(pipe)
    scaled = latents_of(pipe, method="merge", cross_attention_kwargs={"scale": scale}, **CAT)
    expected = plain_pipe("a sks cat", num_inference_steps=2, output_type="latent", generator=seeded()).images
    assert_close(scaled, expected)
    before.assert_unchanged()


@pytest.mark.parametrize("method", EVERY_METHOD)
@pytest.mark.parametrize("error", [None, StoppedError])
def test_adapters_are_what_they_were_after_a_call(pipe, files, method, error):
    with_adapters(pipe, files, {"cat": 0.7, "style": 0.3})
    pipe.set_adapters(["style"], [0.4])
    before = State(pipe)
    if error is None:
        compose(pipe, method=method, **CAT)
    else:
        with pytest.raises(error):
            compose(pipe, method=method, **CAT, **raise_at_step(error))
    before.assert_unchanged()
    assert pipe.get_active_adapters() == ["style"]


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_a_concept_from_a_file_takes_the_place_of_an_adapter_of_its_name(pipe, files, method):
    pipe.load_concept(files["cat"], "cat")
    expected = latents_of(pipe, method=method, **CAT)
    with_adapters(pipe, files, {"cat": 1.0})
    before = State(pipe)
    assert_close(latents_of(pipe, method=method, **CAT), expected)
    before.assert_unchanged()


def test_a_fused_adapter_cannot_be_a_concept(pipe, files):
    with_adapters(pipe, files, {"cat": 1.0})
    pipe.fuse_lora()
    with pytest.raises(LoraError, match=r"'cat' is fused into the weights; call `unfuse_lora\(\)` first"):
        compose(pipe, method="merge", **CAT)


# Concepts


def test_a_concept_is_named_after_its_file_and_takes_what_the_file_says(pipe, write_lora):
    metadata = {"trigger": "sks", "class_word": "cat"}
    path = write_lora("my cat", unet=random_lora(pipe.unet, 0), metadata=metadata)
    concept = pipe.load_concept(path)
    assert concept == Concept(name="my cat", lora=str(path), trigger="sks", class_word="cat", weight=1.0)
    assert pipe.concepts == {"my cat": concept}


def test_what_is_given_at_loading_wins_over_the_file(pipe, write_lora):
    path = write_lora("cat", unet=random_lora(pipe.unet, 0), metadata={"trigger": "sks", "class_word": "cat"})
    concept = pipe.load_concept(str(path), "tom", trigger="zwx", weight=0.5)
    assert concept == Concept(name="tom", lora=str(path), trigger="zwx", class_word="cat", weight=0.5)


def test_what_is_given_in_a_call_wins_over_what_is_loaded(composer):
    lighter = latents_of(composer, concepts=[Concept(name="cat", weight=0.5), "dog"])
    assert far_apart(lighter, latents_of(composer))
    assert composer.concepts["cat"].weight == 1.0
    (found,) = composer.resolve_concepts([Concept(name="cat", trigger="xlo", region=(0, 0, 8, 8))])
    expected = composer.concepts["cat"].model_copy(update={"trigger": "xlo", "region": (0, 0, 8, 8)})
    assert found.concept == expected


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_concepts_does_not_matter(composer, method):
    assert_close(latents_of(composer, method=method, concepts=["dog", "cat"]), latents_of(composer, method=method))


@pytest.mark.parametrize("method", METHODS)
def test_a_concept_of_weight_0_is_as_good_as_absent(composer, method):
    absent = latents_of(composer, method=method, concepts=["cat"])
    assert_close(latents_of(composer, method=method, concepts=["cat", Concept(name="dog", weight=0.0)]), absent)
    nobody = latents_of(composer, method=method, concepts=[Concept(name="cat", weight=0.0)])
    assert_close(nobody, latents_of(composer, concepts=None, method=None))


def test_a_file_can_be_named_in_the_call_alone(pipe, composer):
    path = composer.concepts["cat"].lora
    composer.unload_concept("cat")
    given = latents_of(composer, prompt="a sks cat", concepts=[Concept(name="cat", lora=path)])
    assert "cat" not in composer.concepts
    composer.load_concept(path, "tom")
    assert torch.equal(given, latents_of(composer, prompt="a sks cat", concepts=["tom"]))


def test_another_file_in_the_call_wins_over_the_loaded_one(composer):
    as_dog = Concept(name="cat", lora=composer.concepts["dog"].lora, trigger="sks")
    swapped = latents_of(composer, prompt="a sks cat", concepts=[as_dog])
    (found,) = composer.resolve_concepts([as_dog])
    assert found.file.path.name == "dog-file.safetensors"
    assert far_apart(swapped, latents_of(composer, prompt="a sks cat", concepts=["cat"]))


def test_names_are_given_once(composer, write_lora):
    path = composer.concepts["dog"].lora
    with pytest.raises(ValueError, match="a concept or adapter 'cat' already"):
        composer.load_concept(path, "cat")
    composer.load_lora_weights(path, adapter_name="style")
    with pytest.raises(ValueError, match="a concept or adapter 'style' already"):
        composer.load_concept(path, "style")
    assert list(composer.concepts) == ["cat", "dog"]


def test_unloaded_concepts_are_forgotten_and_can_be_loaded_again(composer):
    path = composer.concepts["cat"].lora
    expected = latents_of(composer)
    composer.unload_concept("cat")
    assert list(composer.concepts) == ["dog"]
    with pytest.raises(ValueError, match=r"unknown concept 'cat'; loaded are dog\. Load it with load_concept"):
        compose(composer)
    with pytest.raises(ValueError, match="no concept 'cat' is loaded; there are dog"):
        composer.unload_concept("cat")
    composer.load_concept(path, "cat")
    assert torch.equal(latents_of(composer), expected)


def test_the_concepts_cannot_be_changed_from_outside(composer):
    composer.concepts.pop("cat")
    assert list(composer.concepts) == ["cat", "dog"]


def test_a_file_that_cannot_be_used_leaves_the_pipeline_as_it_was(composer, write_lora, tmp_path):
    before = State(composer)
    (tmp_path / "broken.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(LoraError, match=r"broken\.safetensors is no.* readable safetensors file"):
        composer.load_concept(tmp_path / "broken.safetensors")
    with pytest.raises(LoraError, match="there is no file"):
        composer.load_concept(tmp_path / "missing.safetensors")
    assert list(composer.concepts) == ["cat", "dog"]
    before.assert_unchanged()


# Cost


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("concepts", [1, 2, 4, 8])
def test_a_call_runs_the_rows_of_diffusers_whatever_the_number_of_concepts(
    pipe, plain_pipe, load_concepts, method, concepts
):
    names = list(CONCEPTS)[:concepts]
    load_concepts(pipe, *names, rank=1)
    prompt = " ".join(CONCEPTS[name] for name in names)
    arguments = {"num_inference_steps": 3, "num_images_per_prompt": 2, "output_type": "latent"}
    counts = []
    for each, more in ((plain_pipe, {}), (pipe, {"concepts": names, "method": method})):
        rows: list[int] = []
        each.unet.register_forward_pre_hook(lambda module, inputs, rows=rows: rows.append(len(inputs[0])))
        output = each([prompt, prompt], **arguments, **more)
        counts.append(rows)
    assert counts[0] == counts[1] == [8, 8, 8]
    assert output.cost.rows_forward == 24
    assert output.cost.rows_backward == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("guidance_scale", "rows"), [(7.5, 2), (1.0, 1), (0.0, 1)])
def test_without_guidance_half_of_the_rows_are_run(composer, method, guidance_scale, rows):
    assert compose(composer, method=method, guidance_scale=guidance_scale).cost.rows_forward == 2 * rows


@dataclass(frozen=True)
class _Slow:
    """Merge that takes its time, before the loop and in it."""

    def start(self, engine: Engine) -> OnePass:
        time.sleep(0.1)
        one_pass = Merge().start(engine)
        return _SlowPass(one_pass.engine, one_pass.conditioning, one_pass.gates)


class _SlowPass(OnePass):
    def prepare(self, latents: Tensor) -> Tensor:
        time.sleep(0.2)
        return super().prepare(latents)

    def step(self, latents: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        time.sleep(0.4)
        return super().step(latents, t)


class _SlowToCheck(ComposeStableDiffusionPipeline):
    def check_inputs(self, *args: Any, **kwargs: Any) -> None:
        time.sleep(0.4)
        super().check_inputs(*args, **kwargs)


def test_preparation_lasts_from_the_call_to_the_first_step(write_lora):
    pipe = tiny_pipeline(_SlowToCheck)
    pipe.load_concept(write_lora("cat", unet=random_lora(pipe.unet, 0)), trigger="sks")
    start = time.perf_counter()
    cost = compose(pipe, concepts=["cat"], method=_Slow()).cost
    assert 0.7 <= cost.preparation_seconds <= time.perf_counter() - start - 0.8


# What cannot be


def too_long(words: int) -> str:
    return " ".join(["a"] * words) + " sks cat and zwx dog"


BAD = {
    "trigger not in the prompt": (
        {"prompt": "a cat and a zwx dog"},
        r"the trigger 'sks' of concept 'cat' is not in the prompt 'a cat and a zwx dog'; write 'sks cat'",
    ),
    "trigger missing from the second prompt": ({"prompt": [PROMPT, "a sks cat"]}, "the trigger 'zwx' of concept 'dog'"),
    "trigger past the limit": (
        {"prompt": too_long(28)}, r"'zwx' of concept 'dog' stands at tokens 32 to 32.*reads only 30",
    ),
    "triggers that overlap": (
        {"concepts": ["cat", Concept(name="dog", trigger="sks")]}, "triggers of concepts 'cat'.*'dog'.*share words",
    ),
    "unknown concept": ({"concepts": ["cat", "fox"]}, "unknown concept 'fox'; loaded are cat, dog"),
    "concept twice": ({"concepts": ["cat", "cat"]}, "'cat' stands twice"),
    "a string as concepts": ({"concepts": "cat"}, "concepts must be a list of names or Concepts, not 'cat'"),
    "a concept as concepts": ({"concepts": Concept(name="cat")}, "concepts must be a list"),
    "unknown method": ({"method": "blend"}, "unknown method 'blend'; there are .*merge.*tara"),
    "a class as method": ({"method": Tara}, "method must be one of .*merge.* or a settings object"),
    "something else as method": ({"method": 3}, "method must be one of .*merge.* or a settings object, not 3"),
    "no steps": ({"num_inference_steps": 0}, "num_inference_steps must be at least 1, not 0"),
    "no number of steps": (
        {"num_inference_steps": None},
        "num_inference_steps may be None only with timesteps or sigmas",
    ),
    "no timesteps": ({"timesteps": []}, "timesteps is empty; give one for each step"),
    "no noise levels": ({"sigmas": []}, "sigmas is empty; give one for each step"),
    "negative steps": ({"num_inference_steps": -2}, "num_inference_steps must be at least 1, not -2"),
    "size not a multiple of 8": ({"width": 60}, "divisible by 8 but are 128 and 60"),
    "negative size": ({"height": -64}, "width and height must be positive, not 128 x -64"),
    "no size": ({"height": 0, "width": 64}, "width and height must be positive, not 64 x 0"),
    "region outside the canvas": (
        {"concepts": [Concept(name="cat", region=(64, 0, 136, 64)), "dog"]},
        r"the region \(64, 0, 136, 64\) of concept 'cat' leaves the canvas of 128 x 128",
    ),
    "positions with a prompt": ({"token_positions": POSITIONS}, "token_positions go with prompt_embeds"),
    "attention of steps that there are not": (
        {"record_attention": [0, 2]}, r"record_attention names steps \[2\], but there are 2",
    ),
    "attention of steps before the first": (
        {"record_attention": [-3]}, r"record_attention names steps \[-3\], but there are 2",
    ),
    "method without concepts": ({"concepts": None}, "method, token_positions and record_attention need concepts"),
    "attention without concepts": (
        {"concepts": [], "method": None, "record_attention": True}, "record_attention need concepts",
    ),
    "no prompt": ({"prompt": None}, "Provide either `prompt` or `prompt_embeds`"),
    "no trigger for tara": (
        {"concepts": [Concept(name="cat", trigger=""), "dog"]}, "tara needs to know the words of concept 'cat'",
    ),
    "fewer generators than images": (
        {"generator": [seeded()], "num_images_per_prompt": 2}, "list of generators of length 1.*batch size of 2",
    ),
    "fewer negative prompts": ({"prompt": [PROMPT] * 2, "negative_prompt": ["dark"]}, "has batch size 1, but `prompt`"),
    "timesteps for a scheduler that takes none": ({"timesteps": [900, 1]}, "does not support custom timestep"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_a_clear_message_and_changes_nothing(composer, case):
    arguments, message = BAD[case]
    before = State(composer)
    generator = seeded()
    drawn = generator.get_state()
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        compose(composer, **{"generator": generator} | arguments)
    before.assert_unchanged()
    assert torch.equal(generator.get_state(), drawn)
    assert torch.isfinite(latents_of(composer)).all()


BAD_POSITIONS = {
    "unknown concept": ({"cat": [2], "fox": [6]}, r"token_positions names \['fox'\]"),
    "outside the embeddings": ({"cat": [2], "dog": [32]}, "between 0 and 31"),
    "negative": ({"cat": [-1], "dog": [6]}, "between 0 and 31"),
    "shared": ({"cat": [2, 6], "dog": [6]}, "two concepts share a token"),
    "other number of prompts": ({"cat": [[2], [2]], "dog": [6]}, "'cat' are for 2 prompts, there are 1"),
    "missing": ({"cat": [2]}, "tara needs to know the words of concept 'dog'.*token_positions"),
    "none": (None, "tara needs to know the words of concept 'cat'"),
}


@pytest.mark.parametrize("case", BAD_POSITIONS)
def test_bad_positions_are_refused(composer, case):
    positions, message = BAD_POSITIONS[case]
    positive, negative = composer.encode_prompt(PROMPT, torch.device("cpu"), 1, True)
    before = State(composer)
    with pytest.raises(ValueError, match=message):
        compose(
            composer, prompt=None, prompt_embeds=positive, negative_prompt_embeds=negative, token_positions=positions
        )
    before.assert_unchanged()


def test_without_a_method_the_choice_is_logged_with_its_reason(composer, caplog):
    caplog.set_level("INFO", "lora_compose.pipelines.methods")
    assert torch.equal(latents_of(composer, method=None), latents_of(composer, method="tara"))
    assert "method: tara, because every concept" in caplog.text
    caplog.clear()
    concepts = [Concept(name="cat", trigger=""), "dog"]
    chosen = latents_of(composer, method=None, concepts=concepts)
    assert torch.equal(chosen, latents_of(composer, method=Merge(), concepts=concepts))
    assert "method: merge, because cat is not named by trigger and class word" in caplog.text


def test_ordinary_loras_without_regions_are_told_apart_by_their_words(composer, caplog):
    caplog.set_level("INFO", "lora_compose.pipelines.methods")
    ordinary = [Concept(name=f"{name}-plain", lora=composer.concepts[name].lora, trigger=trigger, class_word=name)
                for name, trigger in (("cat", "sks"), ("dog", "zwx"))]  # fmt: skip
    loaded = [replace(concept, file=None) for concept in composer.resolve_concepts(ordinary)]
    assert isinstance(choose_method(loaded, ["a sks cat, a zwx dog"]), Clora)
    assert "method: clora, because the prompt names every concept" in caplog.text
    assert isinstance(choose_method(loaded, ["a sks, a zwx dog"]), Merge)
    assert "merge, because cat-plain is not named by trigger and class word" in caplog.text


@pytest.mark.parametrize("method", ["merge", "tara", "regional"])
def test_methods_with_one_text_say_that_own_prompts_are_not_read(composer, caplog, method):
    cat = Concept(name="cat", region=(0, 0, 64, 128), negative_prompt="blurry")
    latents_of(composer, method=method, concepts=[cat, "dog"])
    said = [record.getMessage() for record in caplog.records if "own prompts" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("the own prompts of cat are not read")
    caplog.clear()
    latents_of(composer, method="lora-composer", concepts=[cat, "dog"])
    assert "own prompts" not in caplog.text


def test_with_a_region_for_everybody_the_choice_depends_on_words(composer, caplog):
    caplog.set_level("INFO", "lora_compose.pipelines.methods")
    boxed = [Concept(name="cat", region=(0, 0, 64, 128)), Concept(name="dog", region=(64, 0, 128, 128))]
    assert torch.equal(
        latents_of(composer, method=None, concepts=boxed), latents_of(composer, method="lora-composer", concepts=boxed)
    )
    assert "method: lora-composer, because every concept has a region" in caplog.text
    nameless = [boxed[0].model_copy(update={"trigger": ""}), boxed[1]]
    chosen = latents_of(composer, method=None, concepts=nameless)
    assert torch.equal(chosen, latents_of(composer, method="regional", concepts=nameless))
    assert "method: regional, because every concept has a region, and not every one a trigger" in caplog.text


def test_a_plain_call_on_a_model_that_is_composing_is_refused_and_the_image_is_not_harmed(pipe, write_lora):
    pipe.load_concept(write_lora("cat", unet=random_lora(pipe.unet, 1)), name="cat", trigger="sks")
    call = {"prompt": "a sks cat", "concepts": ["cat"], "num_inference_steps": 2, "output_type": "latent"}
    alone = pipe(**call, generator=torch.Generator().manual_seed(0)).images

    def call_plainly(pipe, step, timestep, tensors):
        with pytest.raises(RuntimeError, match="composing another image right now"):
            pipe("a cat", num_inference_steps=1)
        return tensors

    again = pipe(**call, generator=torch.Generator().manual_seed(0), callback_on_step_end=call_plainly).images
    assert torch.equal(alone, again)
    pipe("a cat", num_inference_steps=1, output_type="latent")
