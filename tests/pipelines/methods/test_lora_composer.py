"""LoRA-Composer against independent references: diffusers' own LoRAs, and the method written out on a plain model.

Yang et al., "LoRA-Composer", arXiv 2403.11627. What moves latents is in `test_lora_composer_updates`.
"""

import math
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
)
from torch import Tensor

from comparisons import assert_close, far_apart
from components import ATTENTION, EVERYTHING, State, random_lora, save_lora, seeded, tiny_pipeline, with_library
from composing import ALL_LEVELS
from lora_compose.attention import Lora
from lora_compose.pipelines.families.stable_diffusion import ComposeStableDiffusionPipeline
from lora_compose.pipelines.methods import make_method
from lora_compose.pipelines.methods.lora_composer import LoraComposer
from lora_compose.pipelines.scene.scene import Concept
from reference import FullGates, WrittenOut, cells, with_reference
from watched import Watched

PROMPT = "a sks cat and a zwx dog on grass"
TRIGGERS = {"cat": "sks", "dog": "zwx", "bear": "mjq"}
READ = ("attn2.to_k", "attn2.to_v", "attn2.to_out.0")
TEXT = ("q_proj", "v_proj", "fc1")
CANVAS, LEFT, RIGHT = (0, 0, 128, 128), (0, 0, 64, 128), (64, 0, 128, 128)
TOP_LEFT, BOTTOM_RIGHT = (0, 0, 64, 64), (64, 64, 128, 128)
OFF = LoraComposer(inject="off", isolate=False, step_size=0, apart=0, background="scene", rows="all")
IN_PARTS = LoraComposer(apart=1.0, step_size=0)


@pytest.fixture
def tiny() -> ComposeStableDiffusionPipeline:
    """A still smaller pipeline than the common one; its UNet halves latents once."""
    return tiny_pipeline()


@pytest.fixture
def plain_tiny() -> StableDiffusionPipeline:
    """diffusers' own pipeline with the same weights as `tiny`."""
    return tiny_pipeline(StableDiffusionPipeline)


def loaded(
    folder: Path,
    pipe: Any,
    name: str,
    trigger: str | None = None,
    *,
    text: bool = False,
    targets: tuple[str, ...] = ATTENTION,
) -> Lora:
    """Loads a concept under a trigger and returns its factors."""
    seed, size = len(name) + ord(name[0]), 0.1 if targets == EVERYTHING else 0.3
    parts = {"unet": random_lora(pipe.unet, seed, targets=targets, size=size)}
    if text:
        parts["text_encoder"] = random_lora(pipe.text_encoder, seed, targets=TEXT)
    options = {"trigger": trigger or TRIGGERS.get(name), "class_word": name if name in TRIGGERS else None}
    pipe.load_concept(save_lora(folder / f"{name}-file.safetensors", **parts), name, **options)
    return parts["unet"]


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Lora]:
    """Loads a concept under a trigger and returns its factors: `load(pipe, "cat", targets=..., text=True)`."""
    return partial(loaded, tmp_path)


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The concepts "cat" and "dog" of attention layers, and of every layer and the text encoder."""
    found = {}
    for kind, options in (("attention", {}), ("everything", {"text": True, "targets": EVERYTHING})):
        pipe, folder = tiny_pipeline(), tmp_path_factory.mktemp(kind)
        for name in ("cat", "dog"):
            loaded(folder, pipe, name, **options)
        found[kind] = pipe.library
    return found


@pytest.fixture
def composer(tiny, libraries) -> ComposeStableDiffusionPipeline:
    """A small pipeline with the concepts "cat" and "dog"."""
    return with_library(tiny, libraries["attention"])


@pytest.fixture
def composer_of_everything(tiny, libraries) -> ComposeStableDiffusionPipeline:
    """The same; the LoRAs adapt every layer and the text encoder."""
    return with_library(tiny, libraries["everything"])


def at(cat: Any = LEFT, dog: Any = RIGHT, **of_dog: Any) -> list[Concept]:
    return [Concept(name="cat", region=cat), Concept(name="dog", region=dog, **of_dog)]


def compose(pipe: Any, method: Any = "lora-composer", prompt: str | list[str] | None = PROMPT, **given: Any) -> Any:
    settings = {"num_inference_steps": 2, "output_type": "latent", "generator": seeded(), "concepts": at()}
    return pipe(prompt, method=method, **settings | given)


def latents_of(pipe: Any, method: Any = "lora-composer", prompt: str | list[str] = PROMPT, **arguments: Any) -> Tensor:
    return compose(pipe, method, prompt, **arguments).images


def plain_latents(pipe: Any, prompt: str, **arguments: Any) -> Tensor:
    """Of diffusers' own pipeline."""
    given = {"num_inference_steps": 2, "output_type": "latent", "generator": seeded()}
    return pipe(prompt, **given | arguments).images


def with_adapter(pipe: Any, loaded: Any, name: str, weight: float = 1.0) -> Any:
    """A plain pipeline in which diffusers has loaded the file of a concept."""
    pipe.load_lora_weights(loaded.concepts[name].lora, adapter_name=name)
    pipe.set_adapters([name], [weight])
    return pipe


# Against diffusers


def test_with_everything_off_the_background_concept_acts_as_in_diffusers(tiny, plain_tiny, load):
    for name in ("cat", "dog"):
        load(tiny, name, text=True)
    load(tiny, "style", "ohwx", text=True, targets=EVERYTHING)
    concepts = [*at(), Concept(name="style", weight=0.7)]
    found = latents_of(tiny, OFF, "a sks cat and a zwx dog in ohwx style", concepts=concepts)
    scene = "a cat and a dog in ohwx style"
    plain = plain_latents(plain_tiny, scene)
    expected = plain_latents(with_adapter(plain_tiny, tiny, "style", 0.7), scene)
    assert_close(found, expected)
    assert far_apart(expected, plain)


def test_with_everything_off_and_no_background_concept_it_is_the_plain_prompt(composer, plain_tiny):
    assert_close(latents_of(composer, OFF), plain_latents(plain_tiny, "a cat and a dog on grass"))


@pytest.mark.parametrize(
    ("changes", "weight"),
    [pytest.param({"inject": "attn2"}, 0.0, marks=pytest.mark.slow), ({"reinit": "swap"}, 0.8)],
    ids=str,
)
def test_a_region_of_the_whole_canvas_is_an_ordinary_lora_whatever_the_scene_is(
    pipe, plain_pipe, load, changes, weight
):
    load(pipe, "cat", targets=READ, text=True)
    cat = Concept(name="cat", region=CANVAS, prompt="sks cat at night", negative_prompt="dark", weight=weight)
    method = LoraComposer(**{"step_size": 0, "apart": 0, "rows": "all"} | changes)
    expected = plain_latents(with_adapter(plain_pipe, pipe, "cat", weight), "sks cat at night", negative_prompt="dark")
    for scene in ("a house", "sks cat in the water"):
        assert_close(latents_of(pipe, method, scene, concepts=[cat]), expected)


def test_without_guidance_it_does_not_matter_on_which_rows_loras_act(composer):
    images = [
        latents_of(composer, LoraComposer(rows=rows, apart=0), guidance_scale=guidance)
        for guidance in (1.0, 5.0)
        for rows in ("cond_only", "all")
    ]
    assert torch.equal(images[0], images[1])
    assert far_apart(images[2], images[3])


# Against the method written out


APART = ((0, 0, 64, 128), (128, 64, 192, 128))
OVERLAPPING = ((0, 0, 128, 128), (64, 64, 192, 128))


@pytest.mark.parametrize(("inject", "isolate", "rows", "boxes"), [
    ("attn2", True, "all", APART), ("full", False, "all", APART),
    ("full", True, "cond_only", OVERLAPPING),
    pytest.param("attn2", True, "all", ((0, 0, 192, 128), (64, 32, 128, 128)), marks=pytest.mark.slow),
])  # fmt: skip
@torch.no_grad()
def test_injection_and_isolation_equal_their_formula(pipe, plain_pipe, load, inject, isolate, rows, boxes):
    weights, canvas = {"cat": 0.7, "dog": 1.4, "style": 0.5}, (128, 192)
    loras = [
        {layer: replace(factors, scale=weight * factors.scale) for layer, factors in lora.items()}
        for lora, weight in ((load(pipe, name, targets=EVERYTHING), weight) for name, weight in weights.items())
    ]
    method = LoraComposer(inject=inject, isolate=isolate, rows=rows, step_size=0, apart=0)
    concepts = [
        Concept(name=name, weight=weight, region=box)
        for (name, weight), box in zip(weights.items(), (*boxes, None), strict=True)
    ]
    found = latents_of(pipe, method, concepts=concepts, width=192, height=128, negative_prompt="dark")

    unet, scheduler = plain_pipe.unet, plain_pipe.scheduler
    acting = torch.tensor([1.0 if rows == "all" else 0.0, 1.0])
    prompts = ["on grass", "a sks cat on grass", "a zwx dog on grass"]
    encoded = [plain_pipe.encode_prompt(prompt, "cpu", 1, True, "dark") for prompt in prompts]
    texts = torch.stack([torch.cat([negative, positive]) for positive, negative in encoded])
    grids = [(-(-canvas[0] // side), -(-canvas[1] // side)) for side in (8, 16, 32, 64)]
    regions = {grid: torch.stack([cells(box, canvas, grid) for box in boxes], dim=-1) for grid in grids}
    flat = {grid[0] * grid[1]: member.flatten(0, 1) for grid, member in regions.items()}
    what = flat, acting[:, None, None], texts, [loras[2], *loras[:2]], isolate
    unet.set_attn_processor({n: WrittenOut(n.removesuffix(".processor"), *what) for n in unet.attn_processors})
    # In all other layers a concept acts in its region, if at all, and the background everywhere.
    rest = [{name: f for name, f in lora.items() if not name.endswith(READ)} for lora in loras]
    image = {}
    for grid, member in regions.items():
        times = member.sum(dim=-1, keepdim=True)
        gate = torch.cat([member / times.clamp(min=1), torch.ones(*grid, 1)], dim=-1)
        image[grid] = acting[:, None, None, None] * gate
    gates = FullGates(torch.zeros(2, 32, 3), image, acting[:, None].expand(2, 3))
    forward = with_reference(unet, rest if inject == "full" else [{}, {}, rest[2]], gates)
    latents = torch.randn(1, 4, 16, 24, generator=seeded())
    scheduler.set_timesteps(2)
    for t in scheduler.timesteps:
        uncond, cond = forward(torch.cat([latents, latents]), t, texts[0], return_dict=False)[0].chunk(2)
        latents = scheduler.step(uncond + 7.5 * (cond - uncond), t, latents).prev_sample
    assert_close(found, latents)


def test_every_mechanism_makes_another_image(composer):
    changes: list[dict[str, Any]] = [
        {}, {"inject": "attn2"}, {"inject": "off"}, {"isolate": False}, {"rows": "cond_only"}, {"background": "scene"},
        {"reinit": "copy"}, {"reinit": "swap"}, {"apart": 1.0}, {"step_size": 0.2},
    ]  # fmt: skip
    methods = [LoraComposer(**{"rows": "all", "step_size": 0, "apart": 0} | each) for each in changes]
    images = [latents_of(composer, method, concepts=at(TOP_LEFT, (72, 40, 128, 128))) for method in methods]
    assert all(far_apart(one, other) for i, one in enumerate(images) for other in images[:i])


# What acts where


def test_the_background_concept_changes_the_text_of_the_background_alone(tiny, load):
    for name in ("cat", "dog", "style"):
        load(tiny, name, text=True)
    texts, images = [], []
    for weight in (0.0, 1.0):
        method = Watched(LoraComposer(step_size=0, apart=0))
        concepts = [*at(TOP_LEFT, BOTTOM_RIGHT), Concept(name="style", weight=weight)]
        images.append(latents_of(tiny, method, concepts=concepts))
        texts.append(method.process.whole.spec.text.prompt_embeds)
    assert far_apart(texts[0][0], texts[1][0])
    assert torch.equal(texts[0][1:], texts[1][1:])
    assert far_apart(*images)


@pytest.mark.parametrize(("threshold", "columns"), [(1.0, 8), (0.6, 8), (0.5, 9), (0.0, 9)])
def test_cells_belong_to_a_region_from_a_share_on(composer, threshold, columns):
    method = Watched(LoraComposer(step_size=0, apart=0, threshold=threshold))
    compose(composer, method, concepts=at((0, 0, 68, 128), (80, 0, 128, 128)), num_inference_steps=1)
    cat = method.process.whole.spec.gates.image[0][1, :, 0].unflatten(0, (16, 16))
    assert cat[5].tolist() == [1] * columns + [0] * (16 - columns)


def test_the_order_of_concepts_does_not_matter(tiny, load):
    method = LoraComposer(reinit="copy", rows="all")
    for name in ("cat", "dog", "style"):
        load(tiny, name)
    cat = Concept(name="cat", region=(0, 0, 64, 128), prompt="sks cat in the water")
    dog = Concept(name="dog", region=(64, 32, 128, 128), prompt="there is one big zwx dog on grass")
    style = Concept(name="style")
    one, other = (latents_of(tiny, method, concepts=concepts) for concepts in ([cat, dog, style], [style, dog, cat]))
    assert_close(one, other)


# Texts


def test_a_concepts_own_prompts_reach_the_text_of_its_region_alone(composer, plain_tiny):
    method = Watched(LoraComposer(step_size=0, apart=0))
    concepts = at(prompt="a zwx dog at night", negative_prompt="bright")
    compose(composer, method, concepts=concepts, negative_prompt="dark")
    texts = [("on grass", "dark"), ("a sks cat on grass", "dark"), ("a zwx dog at night", "bright")]
    for found, (prompt, negative) in zip(method.process.whole.spec.text.prompt_embeds, texts, strict=True):
        cond, uncond = plain_tiny.encode_prompt(prompt, "cpu", 1, True, negative)
        assert_close(found, torch.cat([uncond, cond]))


def test_every_prompt_of_a_call_has_regional_texts_of_its_own(composer, plain_tiny):
    method = Watched(LoraComposer(step_size=0, apart=0, background="scene"))
    prompts = ["a sks cat and a zwx dog on grass", "the zwx dog with the sks cat in the water"]
    compose(composer, method, prompts, num_images_per_prompt=2, guidance_scale=1)
    found = method.process.whole.spec.text.prompt_embeds
    texts = [
        ["a cat and a dog on grass", "the dog with the cat in the water"],
        ["a sks cat on grass", "the sks cat in the water"],
        ["a zwx dog on grass", "the zwx dog in the water"],
    ]
    for text, expected in zip(found, texts, strict=True):
        assert_close(text, plain_tiny.encode_prompt(expected, "cpu", 2, False)[0])


# Regions of all kinds


SCENES = {
    "not divisible by 64": (136, 104, (0, 0, 60, 104), (70, 20, 136, 90)),
    "smaller than a cell": (128, 96, (3, 3, 6, 6), (65, 1, 70, 5)),
    "nested": (128, 128, (0, 0, 128, 128), (32, 32, 96, 96)),
    "one cell": (8, 8, (0, 0, 4, 8), (4, 0, 8, 8)),
}


@ALL_LEVELS
@pytest.mark.parametrize(
    ("scene", "method"),
    [
        *(pytest.param(it, LoraComposer(), marks=[pytest.mark.slow] * (it == "nested")) for it in SCENES),
        pytest.param("one cell", LoraComposer.official(), marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else value.reinit,
)
def test_any_canvas_and_any_regions_work(pipe, load, scene, method):
    width, height, *boxes = SCENES[scene]
    for name in ("cat", "dog"):
        load(pipe, name, targets=EVERYTHING)
    output = compose(
        pipe,
        method,
        concepts=at(*boxes),
        width=width,
        height=height,
        guidance_scale=1.0,
        num_images_per_prompt=2,
        record_attention=[-1],
    )
    assert output.images.shape == (2, 4, height // 8, width // 8)
    assert output.images.isfinite().all()
    assert output.attention_maps.shape == (1, 2, 2, (height // 8 + 3) // 4, (width // 8 + 3) // 4)
    assert output.attention_maps.isfinite().all()
    assert (output.attention_maps > 0).all()


# Regions on canvases of their own in the first steps


@pytest.mark.parametrize("apart", [1.0, 0.0])
def test_regions_apart_do_not_depend_on_each_other_in_any_layer(composer_of_everything, apart):
    method, change = LoraComposer(apart=apart, step_size=0), {"prompt": "one big zwx dog in the water", "weight": 0.3}
    one, other = (latents_of(composer_of_everything, method, concepts=at(**dog)) for dog in ({}, change))
    assert torch.equal(one[..., :8], other[..., :8]) == (apart == 1.0)
    assert far_apart(one[..., 8:], other[..., 8:])


def test_a_region_of_the_whole_canvas_is_apart_from_nothing(composer):
    concepts = [Concept(name="cat", region=CANVAS)]
    apart, together = (latents_of(composer, LoraComposer(apart=apart), concepts=concepts) for apart in (1.0, 0.0))
    assert_close(apart, together)


def test_regions_and_their_surroundings_come_from_their_canvases_and_the_rest_from_the_whole_one(composer):
    concepts = at(TOP_LEFT, (96, 96, 128, 128))
    apart, together = (
        latents_of(composer, LoraComposer(apart=apart, step_size=0), concepts=concepts, num_inference_steps=1)
        for apart in (1.0, 0.0)
    )
    shown = torch.zeros(16, 16, dtype=torch.bool)
    shown[:8, :8] = shown[8:, 8:] = True  # the second region's canvas is larger than the region
    assert torch.equal(apart[..., ~shown], together[..., ~shown])
    assert torch.equal((apart != together).any(dim=1)[0], shown)


def test_no_canvas_shows_the_region_of_another_concept(composer):
    one, other = (
        latents_of(composer, IN_PARTS, concepts=at(TOP_LEFT, (32, 64, 64, 96), prompt=prompt))
        for prompt in ("a zwx dog on grass", "one big zwx dog in the water")
    )
    changed = (one != other).any(dim=1)[0]
    assert changed[8:12, 4:8].all()
    assert not changed[:8, :8].any(), "the second concept's canvas reaches into the first one's region"


def test_where_regions_overlap_the_mean_of_their_canvases_counts(composer):
    scenes = {
        "both": at(TOP_LEFT, (32, 32, 96, 96)),
        "cat": at(TOP_LEFT, BOTTOM_RIGHT),
        "dog": at((112, 112, 128, 128), (32, 32, 96, 96)),
    }
    both, cat, dog = (
        latents_of(composer, IN_PARTS, concepts=concepts, num_inference_steps=1)[..., 4:8, 4:8]
        for concepts in scenes.values()
    )
    assert far_apart(cat, dog)
    assert_close(both, (cat + dog) / 2)


@pytest.mark.parametrize(("apart", "boxes", "rows"), [
    (1.0, (LEFT, RIGHT), 8),
    (0.5, (TOP_LEFT, BOTTOM_RIGHT), 8 + 2 * 2 * 2 / 4),
    (1.0, (CANVAS, CANVAS), 16),
], ids=str)  # fmt: skip
def test_canvases_of_regions_cost_their_share_and_the_rest_only_where_there_is_any(composer, apart, boxes, rows):
    method = LoraComposer(apart=apart, step_size=0)
    cost = compose(composer, method, concepts=at(*boxes), num_inference_steps=4).cost
    assert cost.rows_forward == pytest.approx(rows)


def test_the_first_part_of_the_steps_is_apart(composer):
    def images(apart: float) -> list[Tensor]:
        found: list[Tensor] = []

        def keep(pipe, step, timestep, tensors):
            found.append(tensors["latents"])
            return tensors

        compose(
            composer, LoraComposer(apart=apart, step_size=0), num_inference_steps=4, callback_on_step_end=keep,
            callback_on_step_end_tensor_inputs=["latents"],
        )  # fmt: skip
        return found

    never, half, always = (images(apart) for apart in (0.0, 0.5, 1.0))
    assert [torch.equal(one, other) for one, other in zip(half, always, strict=True)] == [True, True, False, False]
    assert far_apart(never[0], half[0])


@pytest.mark.parametrize(
    ("apart_side", "width", "height"), [(0.0, 256, 128), (0.5, 256, 128), (0.7, 256, 256), (1.0, 256, 128)]
)
def test_the_canvas_of_a_region_has_a_share_of_the_size_that_the_model_was_made_for(
    composer, apart_side, width, height
):
    method = LoraComposer(apart=1.0, apart_side=apart_side, step_size=0)
    concepts = [Concept(name="cat", region=(64, 64, 80, 80))]
    sizes = {"width": width, "height": height, "num_inference_steps": 1, "guidance_scale": 1.0}
    rows = compose(composer, method, concepts=concepts, **sizes).cost.rows_forward
    cells = (rows - 1) * width * height / 64  # without the pass for the rest
    least = max(2, 16 * apart_side)
    assert least**2 <= cells <= (least + 2 * 2) ** 2, "more only to be halved by the UNet"


def test_attention_is_recorded_on_the_whole_canvas_in_every_step(composer):
    method, concepts = LoraComposer(apart=0.5), at(TOP_LEFT, (72, 80, 128, 128))
    output = compose(composer, method, concepts=concepts, num_images_per_prompt=2, record_attention=True)
    assert output.attention_maps.shape == output.masks.shape == (2, 2, 2, 16, 16)
    assert output.attention_maps.isfinite().all()
    assert (output.attention_maps.amax(dim=(-2, -1)) > 0).all()


# Calls of all kinds


@pytest.mark.parametrize(("scheduler", "steps", "guidance", "method"), [
    (LCMScheduler, 2, 0.0, LoraComposer()), (DPMSolverMultistepScheduler, 4, 5.0, LoraComposer.official()),
    (None, 1, 5.0, LoraComposer.official()),
])  # fmt: skip
def test_few_steps_and_other_schedulers_work(composer, scheduler, steps, guidance, method):
    if scheduler is not None:
        composer.scheduler = scheduler.from_config(composer.scheduler.config)
    output = compose(composer, method, num_inference_steps=steps, guidance_scale=guidance)
    assert output.images.isfinite().all()
    assert output.cost.rows_forward == steps * (2 if guidance > 1 else 1)
    assert 1 <= output.cost.rows_backward <= steps // 2 + 1


def test_after_guidance_is_switched_off_a_call_goes_on_as_one_without_it(composer):
    scheduler: Any = EulerDiscreteScheduler.from_config(composer.scheduler.config)
    composer.scheduler = scheduler
    kept: list[Tensor] = []

    def switch_off(pipe, step, timestep, tensors):
        kept.append(tensors["latents"])
        if step == 0:
            pipe._guidance_scale = 0.0
            tensors |= {"prompt_embeds": tensors["prompt_embeds"][-1:]}
        return tensors

    method = LoraComposer(step_size=0, apart=1.0)
    inputs = ["latents", "prompt_embeds"]
    expected = latents_of(
        composer, method, num_inference_steps=3, callback_on_step_end=switch_off,
        callback_on_step_end_tensor_inputs=inputs,
    )  # fmt: skip
    rest = scheduler.timesteps[1:].tolist()
    scheduler.set_timesteps(timesteps=rest)
    start = kept[0] / scheduler.init_noise_sigma
    found = latents_of(composer, method, timesteps=rest, guidance_scale=1.0, latents=start)
    assert_close(found, expected)
    assert far_apart(found, latents_of(composer, method, timesteps=rest, latents=start))


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


# What is refused


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no region": ({"concepts": ["cat", "dog"]}, "lora-composer needs to know where the concepts are: give at least"),
    "not in the prompt": ({"prompt": "a sks cat on grass"}, "the trigger 'zwx' of concept 'dog' is not in the prompt"),
    "nothing to call it": (
        {"concepts": [Concept(name="cat", region=LEFT, trigger="", class_word="")]},
        "does not name the concept 'cat': give it a trigger .* or give the concept a prompt of its own",
    ),
    "not in its own prompt": (
        {"concepts": at(prompt="a dog on grass")},
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


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_with_a_clear_message_and_changes_nothing(composer, case):
    arguments, message = REFUSED[case]
    before, generator = State(composer), seeded()
    drawn = generator.get_state()
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        compose(composer, **arguments, generator=generator)
    before.assert_unchanged()
    assert torch.equal(generator.get_state(), drawn)


def test_a_background_concept_has_to_be_named_in_the_prompt_that_it_is_read_in(composer):
    ink = Concept(name="ink", trigger="mjq", lora=composer.concepts["cat"].lora, prompt="in mjq style")
    before = State(composer)
    missing = "the trigger 'mjq' of concept 'ink' is not in the prompt 'a sks cat and a zwx dog on grass'"
    with pytest.raises(ValueError, match=missing):
        compose(composer, concepts=[*at(), ink])
    before.assert_unchanged()


@pytest.mark.parametrize("own", [{"prompt": "in ohwx style"}, {"negative_prompt": "bright"}, {}], ids=str)
def test_own_prompts_that_are_not_read_are_mentioned(composer, caplog, own):
    concepts = [*at(prompt="a zwx dog"), Concept(name="ink", lora=composer.concepts["cat"].lora, **own)]
    latents_of(composer, concepts=concepts, num_inference_steps=1)
    said = [record.message for record in caplog.records if "are not read" in record.message]
    assert said == (["the own prompts of ink are not read: without a region a concept acts in the background, which "
                     "reads the scene's prompt"] if own else [])  # fmt: skip


def test_embeddings_in_place_of_a_prompt_are_refused(composer):
    positive, negative = composer.encode_prompt(PROMPT, torch.device("cpu"), 1, True)
    given = {"prompt": None, "prompt_embeds": positive, "negative_prompt_embeds": negative}
    before = State(composer)
    with pytest.raises(ValueError, match="it needs prompts, not prompt_embeds"):
        compose(composer, token_positions={"cat": [2], "dog": [6]}, **given)
    before.assert_unchanged()


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
def test_unknown_settings_and_values_out_of_range_are_refused(changes, message):
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
