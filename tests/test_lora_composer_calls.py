"""LoRA-Composer in calls of all kinds: canvases, schedulers, precisions, offloading, and what is refused.

Yang et al., "LoRA-Composer", arXiv 2403.11627.
"""

import math
import re
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
)
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from torch import Tensor, nn

from components import ATTENTION, EVERYTHING, random_lora, seeded, small_pipeline, tiny_pipeline
from lora_compose.compose.benchmark.counting import count_run
from lora_compose.pipelines.families.stable_diffusion import ComposeStableDiffusionPipeline
from lora_compose.pipelines.methods import make_method
from lora_compose.pipelines.methods.lora_composer import LoraComposer
from lora_compose.pipelines.scene import Concept

PROMPT = "a sks cat and a zwx dog on grass"
TRIGGERS = {"cat": "sks", "dog": "zwx"}
LEFT, RIGHT = (0, 0, 64, 128), (64, 0, 128, 128)
NUMPY_2 = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture
def load(write_lora) -> Callable[..., Any]:
    """Loads the concepts "cat" and "dog"."""

    def load(pipe: Any, targets: tuple[str, ...] = ATTENTION, *, text: bool = False) -> Any:
        for seed, (name, trigger) in enumerate(TRIGGERS.items()):
            parts = {"unet": random_lora(pipe.unet, seed, targets=targets, size=0.3 if targets == ATTENTION else 0.1)}
            if text:
                parts["text_encoder"] = random_lora(pipe.text_encoder, seed, targets=("q_proj", "v_proj"))
            pipe.load_concept(write_lora(f"{name}-file", **parts), name, trigger=trigger, class_word=name)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return load


@pytest.fixture
def composer(load) -> ComposeStableDiffusionPipeline:
    """A small pipeline with both concepts."""
    return load(tiny_pipeline())


def at(cat: Any, dog: Any, **of_dog: Any) -> list[Concept]:
    return [Concept(name="cat", region=cat), Concept(name="dog", region=dog, **of_dog)]


def compose(pipe: Any, method: Any = "lora-composer", **arguments: Any) -> Any:
    given = {"prompt": PROMPT, "concepts": at(LEFT, RIGHT), "num_inference_steps": 2, "guidance_scale": 4.0}
    return pipe(method=method, **{"output_type": "latent", "generator": seeded()} | given | arguments)


def latents_of(pipe: Any, method: Any = "lora-composer", **arguments: Any) -> Tensor:
    return compose(pipe, method, **arguments).images


def assert_close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def far_apart(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() > 1e-2)


# Regions of all kinds


def test_a_mask_acts_as_the_box_that_it_shows(composer, tmp_path):
    mask = Image.new("L", (256, 256))
    mask.paste(255, (0, 0, 128, 256))
    mask.save(tmp_path / "left.png")
    box, masked = (latents_of(composer, concepts=at(left, RIGHT)) for left in (LEFT, str(tmp_path / "left.png")))
    assert torch.equal(box, masked)
    mask.paste(0, (0, 0, 128, 64))
    mask.save(tmp_path / "left.png")
    assert far_apart(box, latents_of(composer, concepts=at(str(tmp_path / "left.png"), RIGHT)))


def test_two_concepts_on_one_box_share_it_in_equal_parts(composer):
    """In the first cross-attention, of which the input is the same for all: the mean of what each would give alone."""
    outputs: list[Tensor] = []
    layer = composer.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    layer.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    method = LoraComposer(inject="attn2", step_size=0, apart=0)
    boxed = [Concept(name=name, region=LEFT, prompt=f"a {TRIGGERS[name]} {name}") for name in TRIGGERS]
    images = [
        latents_of(composer, method, prompt="on grass", concepts=concepts, num_inference_steps=1)
        for concepts in (boxed, boxed[::-1], boxed[:1], boxed[1:])
    ]
    assert_close(images[0], images[1])
    both, _, cat, dog = outputs
    assert far_apart(cat, dog)
    torch.testing.assert_close(both, (cat + dog) / 2, atol=1e-5, rtol=1e-5)


SCENES = {
    "wide": (192, 64, (0, 0, 64, 64), (128, 0, 192, 64)),
    "not divisible by 64": (136, 104, (0, 0, 60, 104), (70, 20, 136, 90)),
    "smaller than a cell": (128, 96, (3, 3, 6, 6), (65, 1, 70, 5)),
    "overlapping": (128, 128, (0, 0, 96, 96), (32, 32, 128, 128)),
    "nested": (128, 128, (0, 0, 128, 128), (32, 32, 96, 96)),
    "one cell": (8, 8, (0, 0, 4, 8), (4, 0, 8, 8)),
}


@pytest.mark.parametrize("method", [LoraComposer(), LoraComposer.official()], ids=["default", "official"])
@pytest.mark.parametrize("scene", SCENES)
def test_any_canvas_and_any_regions_work(load, scene, method):
    width, height, *boxes = SCENES[scene]
    pipe = load(small_pipeline(), EVERYTHING)
    output = compose(
        pipe, method, concepts=at(*boxes), width=width, height=height, num_images_per_prompt=2, record_attention=[-1]
    )
    assert output.images.shape == (2, 4, height // 8, width // 8)
    assert output.images.isfinite().all()
    assert output.attention_maps.shape == (1, 2, 2, (height // 8 + 3) // 4, (width // 8 + 3) // 4)
    assert output.attention_maps.isfinite().all()
    assert (output.attention_maps > 0).all()


# Calls


@NUMPY_2
@pytest.mark.parametrize("method", [LoraComposer(), LoraComposer.official()], ids=["default", "official"])
@pytest.mark.parametrize(("scheduler", "steps", "guidance"), [
    (LCMScheduler, 1, 1.0), (LCMScheduler, 4, 0.0), (DPMSolverMultistepScheduler, 8, 5.0),
    (EulerDiscreteScheduler, 4, 5.0), (EulerAncestralDiscreteScheduler, 4, 1.0), (None, 1, 5.0),
])  # fmt: skip
def test_few_steps_and_other_schedulers_work(composer, scheduler, steps, guidance, method):
    if scheduler is not None:
        composer.scheduler = scheduler.from_config(composer.scheduler.config)
    output = compose(composer, method, num_inference_steps=steps, guidance_scale=guidance)
    assert output.images.isfinite().all()
    assert output.cost.rows_forward == steps * (2 if guidance > 1 else 1)
    assert 1 <= output.cost.rows_backward <= steps // 2 + 1


@pytest.mark.parametrize("apart", [0.0, 1.0])
def test_a_callback_may_switch_guidance_off(composer, apart):
    cut = SDCFGCutoffCallback(cutoff_step_ratio=0.25)
    method = LoraComposer(apart=apart)
    output = compose(composer, method, num_inference_steps=4, callback_on_step_end=cut)
    assert output.images.isfinite().all()
    assert output.cost.rows_forward == 2 + 2 + 1 + 1
    assert far_apart(output.images, latents_of(composer, method, num_inference_steps=4))


@pytest.mark.parametrize("apart", [0.0, 1.0])
def test_keys_and_values_are_made_once_for_guidance_and_once_without_it(composer, apart):
    made: list[int] = []
    layer = composer.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k
    layer.register_forward_hook(lambda module, inputs, output: made.append(output.shape[-3]))
    cut = SDCFGCutoffCallback(cutoff_step_ratio=0.25)
    compose(composer, LoraComposer(apart=apart), num_inference_steps=4, callback_on_step_end=cut)
    assert sorted(made) == [1, 2], "rows: also of updates, which have no negative prompt"


@NUMPY_2
@pytest.mark.parametrize("apart", [0.0, 1.0])
def test_after_guidance_is_switched_off_a_call_goes_on_as_one_without_it(composer, apart):
    scheduler: Any = EulerDiscreteScheduler.from_config(composer.scheduler.config)
    composer.scheduler = scheduler
    kept: list[Tensor] = []

    def switch_off(pipe, step, timestep, tensors):
        kept.append(tensors["latents"])
        if step == 1:
            pipe._guidance_scale = 0.0
            tensors |= {"prompt_embeds": tensors["prompt_embeds"][-1:]}
        return tensors

    method = LoraComposer(step_size=0, apart=apart)
    inputs = ["latents", "prompt_embeds"]
    expected = latents_of(
        composer, method, num_inference_steps=5, callback_on_step_end=switch_off,
        callback_on_step_end_tensor_inputs=inputs,
    )  # fmt: skip
    rest = scheduler.timesteps[2:].tolist()
    scheduler.set_timesteps(timesteps=rest)
    start = kept[1] / scheduler.init_noise_sigma
    found = latents_of(composer, method, timesteps=rest, guidance_scale=1.0, latents=start)
    assert_close(found, expected)
    assert far_apart(found, latents_of(composer, method, timesteps=rest, latents=start))


def test_rows_are_exchanged_where_all_prompts_are_exchanged_with_the_negative_ones(composer):
    outputs: list[Tensor] = []
    composer.unet.register_forward_hook(lambda module, inputs, output: outputs.append(output[0]))
    own = {name: (f"a {trigger} {name} at night", f"{trigger} in the water") for name, trigger in TRIGGERS.items()}
    for ahead in (0, 1):
        boxes = {"cat": (0, 0, 64, 64), "dog": (64, 64, 128, 128)}
        concepts = [
            Concept(name=name, region=boxes[name], prompt=texts[ahead], negative_prompt=texts[1 - ahead])
            for name, texts in own.items()
        ]
        scene = ("on grass", "in snow")
        compose(
            composer, LoraComposer(step_size=0, apart=0, rows="all"), prompt=scene[ahead],
            negative_prompt=scene[1 - ahead], concepts=concepts, num_inference_steps=1,
        )  # fmt: skip
    one, other = outputs
    assert far_apart(one[0], one[1])
    torch.testing.assert_close(one, other.flip(0), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_compiled_unet_gives_the_same_image(composer):
    boxes = (0, 0, 96, 96), (32, 32, 128, 128)
    call = {"concepts": at(*boxes), "num_inference_steps": 1, "method": LoraComposer(apart=0)}
    expected = latents_of(composer, **call)
    plain = composer.unet
    composer.unet = torch.compile(plain, backend="eager")
    try:
        assert_close(latents_of(composer, **call), expected)
    finally:
        composer.unet = plain
        torch.compiler.reset()


def test_all_map_steps_have_the_concepts_in_them(composer):
    output = compose(
        composer, LoraComposer(apart=0), num_inference_steps=3, num_images_per_prompt=2, width=96, height=64,
        concepts=at((0, 0, 48, 64), (48, 0, 96, 64)), record_attention=True,
    )  # fmt: skip
    assert output.attention_maps.shape == output.masks.shape == (3, 2, 2, 8, 12)
    assert output.attention_maps.isfinite().all()
    assert (output.attention_maps > 0).all()


@NUMPY_2
def test_schedulers_with_two_passes_per_step_work(composer):
    composer.scheduler = HeunDiscreteScheduler.from_config(composer.scheduler.config)
    output = compose(composer, LoraComposer(), num_inference_steps=3)
    assert output.images.isfinite().all()
    assert output.cost.rows_forward == 2 * 5


@NUMPY_2
@pytest.mark.parametrize("scheduler", [HeunDiscreteScheduler, EulerDiscreteScheduler])
def test_latents_are_updated_only_where_the_scheduler_goes_on_from_them(composer, scheduler):
    """A second pass of a step goes back to the latents of the first one."""
    composer.scheduler = scheduler.from_config(composer.scheduler.config)
    method = LoraComposer(least_updates=1.0, most_updates=1.0)
    passes = 5 if scheduler.order == 2 else 3
    updated = 3
    cost = compose(composer, method, num_inference_steps=3).cost
    assert (cost.rows_forward, cost.rows_backward) == (2 * passes, updated)
    loaded = composer.resolve_concepts(at(LEFT, RIGHT))
    assert count_run(composer, method, loaded, 3, 4.0, 128, 128).rows_backward == updated


@pytest.mark.parametrize("method", [LoraComposer(reinit="swap"), LoraComposer.official()], ids=["swap", "official"])
def test_half_precision_works(composer, method):
    composer.to(torch.bfloat16)
    found = latents_of(composer, method, num_inference_steps=4)
    assert found.dtype == torch.bfloat16
    assert found.isfinite().all()


def test_plain_attention_of_diffusers_gives_the_same_image(composer):
    method = LoraComposer(reinit="copy", apart=0.3)
    expected = latents_of(composer, method, num_inference_steps=4)
    composer.unet.set_attn_processor(AttnProcessor())
    assert_close(latents_of(composer, method, num_inference_steps=4), expected)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_adapters_of_diffusers_compose_as_files_do(composer):
    method, pipe = LoraComposer(reinit="copy", apart=0.3), tiny_pipeline()
    for name in TRIGGERS:
        pipe.load_lora_weights(composer.concepts[name].lora, adapter_name=name)
    boxes = {"cat": LEFT, "dog": RIGHT}
    concepts = [Concept(name=n, region=boxes[n], trigger=TRIGGERS[n], class_word=n) for n in TRIGGERS]
    before = state_of(pipe)
    found = latents_of(pipe, method, num_inference_steps=4, concepts=concepts)
    assert_close(found, latents_of(composer, method, num_inference_steps=4))
    assert state_of(pipe) == before


def offload_models(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def offload_layers(pipe: Any) -> None:
    """What `enable_sequential_cpu_offload` does, with the CPU as the device that layers are brought to."""
    for model in (pipe.text_encoder, pipe.unet, pipe.vae):
        cpu_offload(model, torch.device("cpu"), offload_buffers=len(model._parameters) > 0)


@pytest.mark.parametrize("offload", [offload_models, offload_layers])
def test_offloaded_models_give_the_same_image_again_and_again(load, offload):
    pipe = load(tiny_pipeline(), text=True)
    method = LoraComposer(reinit="swap", apart=0.3)
    expected = latents_of(pipe, method, num_inference_steps=4)
    offload(pipe)
    for _ in range(2):
        assert_close(latents_of(pipe, method, num_inference_steps=4), expected)


class StoppedError(Exception):
    pass


def state_of(pipe: Any) -> dict[str, Any]:
    """What a call must leave alone, by identity."""
    models = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    modules = {f"{part}.{name}": m for part, model in models.items() for name, m in model.named_modules()}
    tensors = {f"{part}.{name}": p for part, model in models.items() for name, p in model.named_parameters()}
    return {
        "modules": {name: (id(m), m.training, len(m._forward_hooks)) for name, m in modules.items()},
        "parameters": {name: (id(p), p.requires_grad, p.grad) for name, p in tensors.items()},
        "processors": {name: id(processor) for name, processor in pipe.unet.attn_processors.items()},
        "noise": torch.get_rng_state().tolist(),
    }


@pytest.mark.parametrize("error", [None, StoppedError, KeyboardInterrupt])
def test_nothing_is_left_after_a_call_however_it_ends(load, error):
    pipe = load(tiny_pipeline(), EVERYTHING, text=True)
    pipe.unet.down_blocks[0].requires_grad_(False)
    pipe.unet.up_blocks[1].train()
    bits = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    before = state_of(pipe)

    def stop(pipe, step, timestep, tensors):
        if error is not None:
            raise error
        return tensors

    if error is None:
        compose(pipe, LoraComposer.official(), callback_on_step_end=stop)
    else:
        with pytest.raises(error):
            compose(pipe, LoraComposer.official(), callback_on_step_end=stop)
    assert state_of(pipe) == before
    assert all(torch.equal(tensor, bits[name]) for name, tensor in pipe.unet.state_dict().items())


# What cannot be


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no region": ({"concepts": ["cat", "dog"]}, "lora-composer needs to know where the concepts are: give at least"),
    "not in the prompt": ({"prompt": "a sks cat on grass"}, "the trigger 'zwx' of concept 'dog' is not in the prompt"),
    "nothing to call it": (
        {"concepts": [Concept(name="cat", region=LEFT, trigger="", class_word="")]},
        "does not name the concept 'cat': give it a trigger .* or give the concept a prompt of its own",
    ),
    "not in its own prompt": (
        {"concepts": at(LEFT, RIGHT, prompt="a dog on grass")},
        "the trigger 'zwx' of concept 'dog' is not in the prompt 'a dog on grass'",
    ),
    "nothing to move it by": (
        {"concepts": [Concept(name="cat", region=LEFT, trigger="", class_word="", prompt="a cat")]},
        "lora-composer moves 'cat' by its words: give it a trigger",
    ),
    "outside the canvas": (
        {"concepts": at(LEFT, (64, 0, 136, 128))}, r"the region \(64, 0, 136, 128\) of concept 'dog' leaves the canvas",
    ),
    "unknown setting": ({"method": "lora-composer2"}, "unknown method"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_a_clear_message_and_changes_nothing(composer, case):
    arguments, message = BAD[case]
    before, generator = state_of(composer), seeded()
    drawn = generator.get_state()
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        compose(composer, **{"generator": generator} | arguments)
    assert state_of(composer) == before
    assert torch.equal(generator.get_state(), drawn)


def test_a_mask_of_other_proportions_is_refused(composer, tmp_path):
    Image.new("L", (128, 64), 255).save(tmp_path / "wide.png")
    before = state_of(composer)
    with pytest.raises(ValueError, match="has 128 x 64 pixels, the canvas 128 x 128: their proportions differ"):
        compose(composer, concepts=at(str(tmp_path / "wide.png"), RIGHT))
    assert state_of(composer) == before


def test_a_background_concept_has_to_be_named_in_the_prompt_that_it_is_read_in(composer):
    ink = Concept(name="ink", trigger="mjq", lora=composer.concepts["cat"].lora, prompt="in mjq style")
    before = state_of(composer)
    missing = "the trigger 'mjq' of concept 'ink' is not in the prompt 'a sks cat and a zwx dog on grass'"
    with pytest.raises(ValueError, match=missing):
        compose(composer, concepts=[*at(LEFT, RIGHT), ink])
    assert state_of(composer) == before


@pytest.mark.parametrize("own", [{"prompt": "in ohwx style"}, {"negative_prompt": "bright"}, {}], ids=str)
def test_own_prompts_that_nobody_reads_are_mentioned(composer, caplog, own):
    concepts = [*at(LEFT, RIGHT, prompt="a zwx dog"), Concept(name="ink", lora=composer.concepts["cat"].lora, **own)]
    latents_of(composer, concepts=concepts, num_inference_steps=1)
    said = [record.message for record in caplog.records if "are not read" in record.message]
    assert said == (["the own prompts of ink are not read: without a region a concept acts in the background, which "
                     "reads the scene's prompt"] if own else [])  # fmt: skip


def test_embeddings_in_place_of_a_prompt_are_refused(composer):
    positive, negative = composer.encode_prompt(PROMPT, torch.device("cpu"), 1, True)
    given = {"prompt": None, "prompt_embeds": positive, "negative_prompt_embeds": negative}
    before = state_of(composer)
    with pytest.raises(ValueError, match="it needs the prompt as text, not embeddings"):
        compose(composer, token_positions={"cat": [2], "dog": [6]}, **given)
    assert state_of(composer) == before


def test_a_concept_without_words_works_where_nothing_moves_it(composer):
    concepts = [Concept(name="cat", region=LEFT, trigger="", class_word="", prompt="a cat")]
    assert latents_of(composer, LoraComposer(step_size=0), concepts=concepts).isfinite().all()


@pytest.mark.parametrize(("changes", "message"), [
    ({"inject": "attn1"}, "inject must be one of attn2, full, off, not 'attn1'"),
    ({"rows": None}, "rows must be one of cond_only, all, not None"),
    ({"reinit": "move"}, "reinit must be one of off, copy, swap, not 'move'"),
    ({"step_rule": "max"}, "step_rule must be one of raw, rms, not 'max'"),
    ({"background": ""}, "background must be one of surroundings, scene, not ''"),
    *(
        ({name: value}, f"{name} must lie between 0 and 1, not {value}")
        for name in ("threshold", "least_updates", "most_updates", "apart", "apart_side")
        for value in (-0.1, 1.1, math.nan)
    ),
    *(
        ({name: value}, f"{name} must not be negative, and it is {value}")
        for name in ("step_size", "step_decay", "ce_weight", "fill_weight", "region_weight")
        for value in (-1.0, math.inf, math.nan)
    ),
    ({"injection": "full"}, r"lora-composer has no settings \['injection'\]; it has inject, rows"),
], ids=str)  # fmt: skip
def test_settings_that_there_are_not_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_method("lora-composer", changes)


# What was published


# The code sums over the two tokens of a concept, of which the mean counts here.
OFFICIAL = {
    "inject": "attn2", "rows": "all", "isolate": True, "threshold": 1.0, "step_size": 20.0, "step_rule": "raw",
    "step_decay": 0.5, "least_updates": 5 / 50, "most_updates": 25 / 50, "ce_weight": 2 * 8.0, "fill_weight": 2 * 2.0,
    "region_weight": 10.0, "gaussian": True, "reinit": "copy", "apart": 0.0, "background": "scene",
}  # fmt: skip


def test_the_constants_are_those_of_the_code_and_of_the_paper():
    official, paper = asdict(LoraComposer.official()), asdict(LoraComposer.paper())
    del official["apart_side"]  # what is never apart has no sides
    assert official == OFFICIAL
    # L_fill is the sum of the means over both profiles here, and one mean over both in the paper.
    weights = {"ce_weight": 1.0, "fill_weight": 0.25 / 2, "region_weight": 0.8}
    assert {name: value for name, value in paper.items() if value != official.get(name, value)} == {
        **weights, "step_decay": 1.0,
    }  # fmt: skip
    assert make_method("lora-composer") == LoraComposer()
