"""Image-to-image and inpainting: diffusers' own without concepts; with them, as a call from the same latents."""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
)
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageDraw
from torch import Tensor

from components import (
    FAMILIES,
    TINY,
    TINY_XL,
    filled,
    sd_unet,
    sdxl_unet,
    seeded,
    small_pipeline,
    small_vae,
    xl_pipeline,
)
from composing import BOTH, OURS, PROMPT, TRIGGERS, assert_close, composer_of, lora_file, run, same_bits, with_concepts
from lora_compose import ComposePipeline, Concept
from lora_compose.pipelines.denoising.sampler import Sampler, Schedule
from lora_compose.pipelines.images.task import Inpainting
from lora_compose.pipelines.methods import METHODS, Clora, LoraComposer
from pairs import in_pairs

DIFFUSERS = {
    ("sd", False): StableDiffusionImg2ImgPipeline,
    ("sd", True): StableDiffusionInpaintPipeline,
    ("sdxl", False): StableDiffusionXLImg2ImgPipeline,
    ("sdxl", True): StableDiffusionXLInpaintPipeline,
}
IMAGE = Image.fromarray((np.random.default_rng(0).random((128, 128, 3)) * 255).astype("u1"))
PAINTED = (32, 40, 96, 128)
MASK = Image.new("L", (128, 128))
ImageDraw.Draw(MASK).rectangle((32, 40, 95, 127), fill=255)
BOXES = {"cat": (32, 40, 64, 128), "dog": (64, 40, 96, 128)}
BOXED = [Concept(name=name, region=box) for name, box in BOXES.items()]
SHORT = {"num_inference_steps": 4, "strength": 0.5, "guidance_scale": 4.0}

SDXL_SLOW = pytest.mark.parametrize("family", ["sd", pytest.param("sdxl", marks=pytest.mark.slow)])
TASKS = pytest.mark.parametrize("inpaints", [False, True], ids=["image-to-image", "inpainting"])


def task(inpaints: bool) -> dict[str, Any]:
    """Arguments of a call that starts from an image."""
    return SHORT | {"image": IMAGE} | ({"mask_image": MASK} if inpaints else {})


@cache
def diffusers_pipe(family: str, inpaints: bool) -> Any:
    """The pipeline of diffusers for the task, with the weights of our own."""
    pipe = FAMILIES[family](DIFFUSERS[family, inpaints])
    pipe.set_progress_bar_config(disable=True)
    return pipe


# --- without concepts ---

ARGUMENTS: dict[str, Callable[[], dict[str, Any]]] = {
    "as it is": dict,
    "negative prompts": lambda: {
        "prompt": [PROMPT, "a cat"], "negative_prompt": ["blurry", "dark"], "image": [IMAGE] * 2,
    },
    "generators": lambda: {"num_images_per_prompt": 2, "generator": [seeded(1), seeded(2)]},
    "no guidance, eta": lambda: {"guidance_scale": 1.0, "eta": 0.5},
    "all of the image": lambda: {"strength": 1.0},
    "pil": lambda: {"output_type": "pil"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "case", "inpaints"),
    in_pairs(
        [("sd", case) for case in ARGUMENTS]
        + [("sdxl", "as it is")]
        + [pytest.param("sdxl", case, marks=pytest.mark.slow) for case in ARGUMENTS if case != "as it is"],
        [False, True],
    ),
)
def test_without_concepts_a_call_is_diffusers_own(family, inpaints, case):
    ours = run(composer_of(family), **task(inpaints) | ARGUMENTS[case]())
    theirs = run(diffusers_pipe(family, inpaints), **task(inpaints) | ARGUMENTS[case]())
    assert same_bits(ours.images, theirs.images)


@SDXL_SLOW
@pytest.mark.parametrize(
    ("inpaints", "scheduler"), in_pairs([False, True], [EulerAncestralDiscreteScheduler, HeunDiscreteScheduler])
)
def test_without_concepts_schedulers_do_what_they_do_in_diffusers(family, inpaints, scheduler):
    pipes = copy.copy(composer_of(family)), copy.copy(diffusers_pipe(family, inpaints))
    for pipe in pipes:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    ours, theirs = (run(pipe, **task(inpaints)).images for pipe in pipes)
    assert same_bits(ours, theirs)


@SDXL_SLOW
def test_without_concepts_a_part_of_the_image_is_enlarged_as_in_diffusers(family):
    given = task(True) | {"padding_mask_crop": 4, "output_type": "pil"}
    ours, theirs = (run(pipe, **given).images for pipe in (composer_of(family), diffusers_pipe(family, True)))
    assert same_bits(ours, theirs)


@SDXL_SLOW
@pytest.mark.parametrize("concepts", [None, BOXED])
def test_an_image_processor_that_replaced_the_models_prepares_the_image(family: str, concepts: Any) -> None:
    pipe = copy.copy(composer_of(family))
    pipe.image_processor = VaeImageProcessor(do_resize=False, do_normalize=False)
    pixels = torch.rand(1, 3, 128, 128, generator=seeded(5))
    given = {"num_inference_steps": 2, "strength": 0.5, "concepts": concepts}
    found = run(pipe, image=pixels, generator=seeded(1), **given).images
    generator = seeded(1)
    with torch.no_grad():
        latents = pipe.vae.encode(pixels).latent_dist.sample(generator) * pipe.vae.config.scaling_factor
    assert_close(found, run(pipe, image=latents, generator=generator, **given).images)


@TASKS
@pytest.mark.parametrize("concepts", [None, BOXED])
def test_a_call_sets_the_properties_that_callbacks_and_others_read(inpaints: bool, concepts: Any) -> None:
    pipe, seen = copy.copy(composer_of("sd")), []

    def look(given: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        assert given is pipe
        seen.append((given.guidance_scale, given.num_timesteps))
        pipe._interrupt = True  # by another thread, which knows this pipeline
        return tensors

    run(pipe, concepts=concepts, callback_on_step_end=look, **task(inpaints))
    assert seen == [(4.0, 2)]
    assert pipe.guidance_scale == 4.0
    assert pipe.num_timesteps == 2


def test_masks_are_prepared_as_in_diffusers() -> None:
    ours, theirs = composer_of("sd").mask_processor, diffusers_pipe("sd", True).mask_processor
    assert ours.config == theirs.config
    assert torch.equal(ours.preprocess(MASK), theirs.preprocess(MASK))


@pytest.mark.parametrize("concepts", [None, BOXED])
def test_callbacks_of_inpainting_see_the_mask(concepts: Any) -> None:
    names, seen = ["latents", "mask", "masked_image_latents"], []

    def look(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append({name: tensors[name].shape[-3:] for name in names})
        return tensors

    how = {"callback_on_step_end": look, "callback_on_step_end_tensor_inputs": names}
    run(composer_of("sd"), concepts=concepts, **task(True), **how)
    assert seen == [{"latents": (4, 16, 16), "mask": (1, 16, 16), "masked_image_latents": (4, 16, 16)}] * 2
    with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs"):
        run(composer_of("sd"), concepts=concepts, **task(False), **how)


MASKS = [MASK, MASK.transpose(Image.Transpose.FLIP_LEFT_RIGHT).crop((0, 64, 128, 128)).resize((128, 128))]


@BOTH
def test_each_prompt_may_have_a_mask_without_concepts_as_in_diffusers(family: str) -> None:
    given = task(True) | {"prompt": [PROMPT, "a cat"], "image": [IMAGE] * 2, "mask_image": MASKS}
    assert same_bits(run(composer_of(family), **given).images, run(diffusers_pipe(family, True), **given).images)


@pytest.mark.parametrize("inner", [4, pytest.param(9, marks=pytest.mark.slow)])
def test_each_prompt_may_have_a_mask_with_concepts_as_in_calls_of_its_own(inner: int) -> None:
    pipe = composer_of("sd")
    if inner == 9:
        pipe = with_concepts(ComposePipeline.from_pipe(for_inpainting(StableDiffusionInpaintPipeline)))
    prompts, seen = [PROMPT, "a zwx dog and a sks cat"], []
    given = task(True) | {"concepts": ["cat", "dog"], "method": "tara"}
    several = {"prompt": prompts, "mask_image": MASKS, "image": [IMAGE] * 2}
    both = run(pipe, **given | several, generator=[seeded(i) for i in range(2)]).images
    for i, (prompt, mask) in enumerate(zip(prompts, MASKS, strict=True)):
        own = {"prompt": prompt, "mask_image": mask, "generator": seeded(i)}
        assert_close(both[i : i + 1], run(pipe, **given | own).images)

    def look(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(tensors["mask"])
        return tensors

    how = {"callback_on_step_end": look, "callback_on_step_end_tensor_inputs": ["mask"]}
    run(pipe, **given | several, **how, num_images_per_prompt=2)
    assert torch.equal(seen[0][0], seen[0][1])
    assert torch.equal(seen[0][2], seen[0][3])
    assert not torch.equal(seen[0][1], seen[0][2])


@TASKS
def test_images_of_values_from_minus_1_are_taken_as_in_diffusers(inpaints: bool) -> None:
    pixels = torch.from_numpy(np.array(IMAGE)).permute(2, 0, 1)[None] / 127.5 - 1
    given = task(inpaints) | {"image": pixels}
    found = []
    for pipe, concepts in (
        (diffusers_pipe("sd", inpaints), {}), (composer_of("sd"), {}), (composer_of("sd"), {"concepts": BOXED}),
    ):  # fmt: skip
        with pytest.warns(FutureWarning, match="range"):
            found.append(run(pipe, **given, **concepts).images)
    assert same_bits(found[0], found[1])
    assert_close(found[2], run(composer_of("sd"), **task(inpaints), concepts=BOXED).images, 1e-3)


def for_inpainting(cls: Any) -> Any:
    """A pipeline whose UNet is given mask and masked image."""
    pipe = small_pipeline(cls, sd_unet(**TINY, in_channels=9))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_without_concepts_a_unet_made_for_inpainting_does_what_it_does_in_diffusers():
    ours = run(ComposePipeline.from_pipe(for_inpainting(StableDiffusionInpaintPipeline)), **task(True)).images
    assert same_bits(ours, run(for_inpainting(StableDiffusionInpaintPipeline), **task(True)).images)


def of_eight_channels(cls: Any, family: str) -> Any:
    """A pipeline whose latents have as many channels as the playground's, for which diffusers has no inpainting."""
    channels = {"in_channels": 8, "out_channels": 8}
    if family == "sd":
        pipe = small_pipeline(cls, sd_unet(**TINY, **channels))
    else:
        pipe = xl_pipeline(cls, sdxl_unet(**TINY_XL, **channels))
    pipe.register_modules(vae=small_vae(latent_channels=8, force_upcast=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@SDXL_SLOW
@pytest.mark.parametrize("case", ["negative prompts", "no guidance, eta"])
def test_without_concepts_a_unet_of_other_channels_does_what_diffusers_does_with_four(family, case):
    ours, theirs = of_eight_channels(OURS[family], family), of_eight_channels(DIFFUSERS[family, True], family)
    with pytest.raises(ValueError, match="should have either 4 or 9 input channels"):
        run(theirs, **task(True))
    theirs.unet.register_to_config(in_channels=4)  # all that keeps diffusers from it
    found, expected = (run(pipe, **task(True) | ARGUMENTS[case]()).images for pipe in (ours, theirs))
    assert_close(found, expected)


def test_a_unet_whose_other_channels_are_no_latents_is_refused():
    """As InstructPix2Pix's."""
    pipe = small_pipeline(unet=sd_unet(**TINY, in_channels=8))
    for concepts in (None, [Concept(name="cat", lora=str(lora_file("sd", "cat")))]):
        with pytest.raises(ValueError, match="8 input channels cannot inpaint with a VAE of 4 channels; expected 4"):
            run(pipe, **task(True), concepts=concepts)
        for given in ({}, task(False)):
            with pytest.raises(ValueError, match="8 input channels cannot be used with a VAE of 4 channels; expected"):
                run(pipe, **given, concepts=concepts)


# --- with concepts ---


def alone(family: str, pipe: Any, name: str = "cat") -> Any:
    """The pipeline with one LoRA, loaded as diffusers loads it."""
    pipe = copy.deepcopy(pipe)
    pipe.load_lora_weights(lora_file(family, name), adapter_name=name)
    return pipe


@pytest.mark.parametrize(("family", "inpaints"), [("sd", False), pytest.param("sdxl", True, marks=pytest.mark.slow)])
def test_one_merged_concept_is_a_lora_that_diffusers_loads(family, inpaints):
    ours = run(composer_of(family), **task(inpaints), concepts=["cat"], method="merge").images
    assert_close(ours, run(alone(family, diffusers_pipe(family, inpaints)), **task(inpaints)).images)


def test_one_merged_concept_in_a_unet_made_for_inpainting_is_a_lora_that_diffusers_loads(write_lora):
    theirs = for_inpainting(StableDiffusionInpaintPipeline)
    pipe = ComposePipeline.from_pipe(for_inpainting(StableDiffusionInpaintPipeline))
    path = lora_file("sd", "cat")
    pipe.load_concept(path, "cat")
    theirs.load_lora_weights(path)
    ours = run(pipe, **task(True), concepts=["cat"], method="merge").images
    assert_close(ours, run(theirs, **task(True)).images)


@cache
def with_distinct_words(family: str) -> Any:
    """The pipeline with text encoders that tell words apart, so that rounding moves no cell to another mask."""
    pipe = copy.copy(composer_of(family))
    for name in ("text_encoder", "text_encoder_2"):
        if (encoder := pipe.components.get(name)) is not None:
            pipe.register_modules(**{name: filled(copy.deepcopy(encoder))})
    return pipe


def from_latents(family: str, method: Any, inpaints: bool) -> Tensor:
    """The same by a call of text-to-image that is given the noisy latents and the timesteps that are left."""
    pipe = copy.copy(with_distinct_words(family))
    scheduler: Any = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="linspace")
    scheduler.set_timesteps(SHORT["num_inference_steps"])
    timesteps, generator = scheduler.timesteps[2:].int().tolist(), seeded()
    scheduler.set_timesteps(timesteps=timesteps)
    pipe.scheduler = scheduler
    factor = pipe.vae.config.scaling_factor
    pixels = torch.from_numpy(np.array(IMAGE)).permute(2, 0, 1)[None] / 127.5 - 1
    image = pipe.vae.encode(pixels).latent_dist.sample(generator) * factor
    noise = torch.randn(image.shape, generator=generator)
    noisy = image + noise * scheduler.sigmas[0]
    left = torch.ones(16, 16)
    left[5:16, 4:12] = 0

    def put_back(pipe: Any, step: int, timestep: Any, tensors: Any) -> dict[str, Any]:
        outside = image + noise * scheduler.sigmas[step + 1]  # the last sigma is 0
        return {"latents": left * outside + (1 - left) * tensors["latents"]}

    return run(
        pipe, concepts=BOXED, method=method, guidance_scale=4.0, timesteps=timesteps,
        latents=noisy / scheduler.init_noise_sigma, callback_on_step_end=put_back if inpaints else None,
        height=128, width=128,
    ).images  # fmt: skip


FIND_NOTHING = [name for name in METHODS if name != "clora"]


@pytest.mark.parametrize(
    ("family", "method", "inpaints"),
    [("sd", "regional", False), ("sd", "clora", False), ("sd", "tara", True), ("sd", "lora-composer", True)]
    + [
        pytest.param(family, method, inpaints, marks=pytest.mark.slow)
        for family in FAMILIES
        for method, inpaints in [(name, False) for name in METHODS] + [(name, True) for name in FIND_NOTHING]
    ],
)
def test_every_method_does_what_it_does_from_the_same_latents(family, method, inpaints):
    pipe = copy.copy(with_distinct_words(family))
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="linspace")
    found = run(pipe, **task(inpaints), concepts=BOXED, method=method).images
    assert_close(found, from_latents(family, method, inpaints), 2e-4)


# --- outside of the mask ---


@pytest.mark.parametrize("box", [(32, 40, 96, 128), (0.25, 0.3125, 0.75, 1.0)])
def test_a_box_is_in_pixels_also_where_the_image_is_latents(box: Any) -> None:
    mask = Image.new("L", (128, 128))
    mask.paste(255, (32, 40, 96, 128))
    given = {**SHORT, "image": torch.randn(1, 4, 16, 16, generator=seeded(5)), "concepts": BOXED, "method": "regional"}
    found = run(composer_of("sd"), **given, mask_image=box).images
    assert same_bits(found, run(composer_of("sd"), **given, mask_image=mask).images)


@SDXL_SLOW
@pytest.mark.parametrize("method", ["regional", "lora-composer"])
def test_outside_of_the_mask_the_latents_of_the_image_are_put_back(family, method):
    latents = torch.randn(1, 4, 16, 16, generator=seeded(5))
    found = run(composer_of(family), **task(True) | {"image": latents}, concepts=BOXED, method=method).images
    outside = torch.ones(16, 16, dtype=torch.bool)
    outside[5:16, 4:12] = False
    assert torch.equal(found[..., outside], latents[..., outside])
    assert (found[..., ~outside] - latents[..., ~outside]).abs().max() > 0.1


@SDXL_SLOW
@pytest.mark.parametrize(
    "how",
    [
        {"concepts": ["cat"], "method": "merge", "paste_original": True},
        {"concepts": ["cat"], "method": "merge", "padding_mask_crop": 8},
        {"paste_original": True},
    ],
    ids=["pasted", "cropped", "plain"],
)
def test_pixels_outside_of_the_mask_can_stay_those_of_the_image(family, how):
    (found,) = run(composer_of(family), **task(True), **how, output_type="pil").images
    outside = np.asarray(MASK) == 0
    assert np.array_equal(np.asarray(found)[outside], np.asarray(IMAGE)[outside])
    assert (np.asarray(found)[~outside] != np.asarray(IMAGE)[~outside]).mean() > 0.5


def test_greys_of_a_mask_blend_the_image_and_what_is_painted():
    soft = MASK.point(lambda value: 204 if value else 0)  # type: ignore[operator]
    given = task(True) | {"concepts": ["cat"], "method": "merge", "output_type": "pil"}
    pipe = composer_of("sd")
    (painted,) = run(pipe, **given).images
    (found,) = run(pipe, **given | {"mask_image": soft, "paste_original": True}).images
    inside = np.asarray(MASK) > 0
    mixed = 0.8 * np.asarray(painted, float) + 0.2 * np.asarray(IMAGE, float)
    assert np.abs(np.asarray(found, float) - mixed)[inside].max() <= 2


def test_steps_that_are_taken_ahead_put_back_the_image_at_their_own_noise_level():
    scheduler: Any = EulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(0)
    schedule = Schedule(scheduler.timesteps, 4, 1)
    latents, image, noise = torch.randn(3, 1, 4, 8, 8, generator=seeded(0)).unbind()
    mask = torch.zeros(1, 1, 8, 8)
    task = Inpainting(latents, mask=mask, image=image, noise=noise, timesteps=schedule.timesteps)
    with Sampler(scheduler, schedule, task=task).ahead() as ahead:
        for index in range(2):
            latents = ahead.step(torch.zeros_like(latents), schedule.step(index, 1.0), latents)
    torch.testing.assert_close(latents, image + noise * scheduler.sigmas[2])


# --- where concepts are ---


def test_what_clora_finds_lies_in_the_painted_part():
    output = run(
        composer_of("sd"), **task(True), concepts=["cat", "dog"], method=Clora(mask_until=1.0), record_attention=True
    )
    masks = output.masks[0, 0]
    grid = masks.shape[-1]
    inside = torch.zeros(grid, grid, dtype=torch.bool)
    inside[5 * grid // 16 :, 4 * grid // 16 : 12 * grid // 16] = True
    assert masks.any(dim=(-2, -1)).all()
    assert not masks[:, ~inside].any()


def test_regions_of_lora_composer_are_cut_to_the_painted_part():
    wide = [Concept(name="cat", region=(0, 0, 64, 128)), Concept(name="dog", region=(64, 0, 128, 128))]
    cut = [Concept(name=name, region=box) for name, box in BOXES.items()]
    method = LoraComposer(threshold=0.5)
    pipe = composer_of("sd")
    found, expected = (run(pipe, **task(True), concepts=one, method=method).images for one in (wide, cut))
    assert torch.equal(found, expected)


def test_regions_are_in_the_coordinates_of_the_image():
    """A part of a larger image, enlarged to twice its size, with regions of the image, is that part by itself."""
    large, mask, part = Image.new("RGB", (256, 256), "grey"), Image.new("L", (256, 256)), (64, 64, 128, 128)
    large.paste(IMAGE, (64, 64))
    mask.paste(255, part)
    inside = IMAGE.crop((0, 0, 64, 64)).resize((128, 128), Image.Resampling.LANCZOS)
    pipe = composer_of("sd")
    given = SHORT | {"method": "regional", "output_type": "pil"}
    of_image = [Concept(name="cat", region=(64, 64, 96, 128)), Concept(name="dog", region=(96, 64, 128, 128))]
    of_part = [Concept(name="cat", region=(0, 0, 64, 128)), Concept(name="dog", region=(64, 0, 128, 128))]
    (found,) = run(pipe, **given, image=large, mask_image=mask, padding_mask_crop=0, concepts=of_image).images
    (expected,) = run(pipe, **given, image=inside, mask_image=(0, 0, 128, 128), concepts=of_part).images
    assert np.array_equal(np.asarray(found)[np.asarray(mask) == 0], np.asarray(large)[np.asarray(mask) == 0])
    assert np.array_equal(np.asarray(found.crop(part)), np.asarray(expected.resize((64, 64), Image.Resampling.LANCZOS)))


def test_an_image_is_on_white_where_it_is_transparent():
    pipe = composer_of("sd")
    red, white = Image.new("RGB", IMAGE.size, "red"), Image.new("RGB", IMAGE.size, "white")
    hidden, shown = red.copy(), Image.composite(IMAGE, white, MASK)
    hidden.paste(IMAGE, mask=MASK)
    hidden.putalpha(MASK)  # its red cannot be seen
    expected = run(pipe, **task(True) | {"image": shown}).images
    for given in (hidden, np.asarray(hidden)):
        assert same_bits(run(pipe, **task(True) | {"image": given}).images, expected)


def test_masks_are_taken_as_people_have_them():
    pipe = composer_of("sd")
    same = {
        "box": PAINTED,
        "fractions": [0.25, 0.3125, 0.75, 1.0],
        "8 bits": np.asarray(MASK),
        "bool": np.asarray(MASK) > 0,
        "tensor": torch.from_numpy(np.asarray(MASK) / 255.0),
        "rgb": MASK.convert("RGB"),
        "opacity": Image.merge("RGBA", [Image.new("L", MASK.size)] * 3 + [MASK]),
    }
    expected = run(pipe, **task(True)).images
    for kind, given in same.items():
        assert same_bits(run(pipe, **task(True) | {"mask_image": given}).images, expected), kind


def test_images_are_taken_as_people_have_them(tmp_path):
    IMAGE.save(tmp_path / "image.png")
    MASK.save(tmp_path / "mask.png")
    pipe = composer_of("sd")
    expected = run(pipe, **task(True)).images
    files = {"image": tmp_path / "image.png", "mask_image": str(tmp_path / "mask.png")}
    floats = torch.from_numpy(np.asarray(IMAGE, np.float32) / np.float32(255)).permute(2, 0, 1)
    for given in (files, {"image": np.asarray(IMAGE)}):
        assert same_bits(run(pipe, **task(True) | given).images, expected)
    for given in ({"image": floats}, {"image": floats.permute(1, 2, 0).numpy()}):  # other strides
        assert_close(run(pipe, **task(True) | given).images, expected)


# --- other pipelines ---


@SDXL_SLOW
def test_a_pipeline_for_image_to_image_becomes_one_that_composes(family):
    pipe = ComposePipeline.from_pipe(copy.copy(diffusers_pipe(family, False)))
    pipe.set_progress_bar_config(disable=True)
    for name in TRIGGERS:
        pipe.load_concept(lora_file(family, name), name)
    found = run(pipe, **task(False), concepts=["cat", "dog"], method="tara").images
    assert torch.equal(found, run(composer_of(family), **task(False), concepts=["cat", "dog"], method="tara").images)


@BOTH
def test_diffusers_finds_its_pipelines_for_these_tasks(family):
    pipe = composer_of(family)
    assert type(AutoPipelineForImage2Image.from_pipe(pipe)) is DIFFUSERS[family, False]
    assert type(AutoPipelineForInpainting.from_pipe(pipe)) is DIFFUSERS[family, True]


# --- refused ---

NAN = torch.full((3, 128, 128), float("nan"))

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no image": ({"image": None, "strength": 0.5}, "strength needs an image"),
    "mask alone": ({"image": None, "strength": None, "mask_image": MASK}, "mask_image needs an image"),
    "no such file": ({"image": "lost.png"}, "there is no image 'lost.png'"),
    "another type": ({"image": 3}, "image is a int; expected a PIL image"),
    "an empty list": ({"image": []}, "image is an empty list"),
    "a mode without a range": ({"image": Image.new("F", (128, 128))}, "mode 'F', whose values have no fixed range"),
    "one pixel": ({"image": IMAGE.resize((1, 1))}, "1 x 1 pixels; this model needs at least 8"),
    "no numbers": ({"image": NAN}, "NaN or infinite"),
    "values beyond 1": ({"image": torch.full((3, 128, 128), 2.0)}, "values from 2 to 2"),
    "two channels": ({"image": torch.rand(2, 128, 128)}, r"the shape \[2, 128, 128\]"),
    "whole numbers": ({"image": np.zeros((128, 128, 3), np.int64)}, "an array of int64"),
    "several sizes": ({"image": [IMAGE, IMAGE.resize((64, 64))]}, "different sizes"),
    "mixed kinds": ({"image": [IMAGE, torch.rand(3, 128, 128)]}, "a mixture of kinds"),
    "strength 0": ({"strength": 0.0}, "strength=0 leaves none of the 4 steps; give at least 0.25"),
    "a small strength": ({"strength": 0.2, "num_inference_steps": 3}, "none of the 3 steps; give at least 0.34"),
    "strength 2": ({"strength": 2.0}, "strength must lie between 0 and 1, not 2"),
    "strength nan": ({"strength": float("nan")}, "strength must lie between 0 and 1, not nan"),
    "an empty mask": ({"mask_image": Image.new("L", (128, 128))}, "is all black"),
    "a pale mask": ({"mask_image": Image.new("L", (128, 128), 100)}, "no pixel above half of white"),
    "a mask of other proportions": ({"mask_image": MASK.resize((64, 128))}, "expected the same proportions"),
    "a small mask and a crop": (
        {"mask_image": MASK.resize((64, 64)), "padding_mask_crop": 2, "output_type": "pil"}, "expected the same size",
    ),
    "a mask of no numbers": ({"mask_image": torch.full((128, 128), float("nan"))}, "NaN or outside"),
    "two masks": ({"mask_image": [MASK, MASK]}, "a list of 2 masks, and there are 1 prompts"),
    "a box outside": ({"mask_image": (0, 0, 300, 20)}, "does not lie in the image of 128 x 128 pixels"),
    "a negative padding": ({"mask_image": MASK, "padding_mask_crop": -1}, "at least 0, not -1"),
    "padding without a mask": ({"padding_mask_crop": 4}, "need a mask"),
    "pasting tensors": (
        {"mask_image": MASK, "paste_original": True, "image": torch.rand(3, 128, 128)}, "PIL images, paths",
    ),
    "pasting into latents": ({"mask_image": MASK, "paste_original": True}, "output_type='pil'"),
    "another size": ({"width": 64}, "width and height are those of the image, 128 x 128"),
}  # fmt: skip


@pytest.mark.parametrize("concepts", [None, ["cat"]], ids=["plain", "concepts"])
@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_used_is_refused_with_words(case, concepts):
    wrong, message = WRONG[case]
    given = SHORT | {"image": IMAGE, "concepts": concepts} | wrong
    with pytest.raises(ValueError, match=message):
        run(composer_of("sd"), **given)


def test_what_does_not_go_together_is_refused_with_words():
    pipe = composer_of("sd")
    with pytest.raises(ValueError, match="there are 3 images and 1 prompts"):
        run(pipe, **task(False) | {"image": [IMAGE] * 3}, concepts=["cat"])
    with pytest.raises(ValueError, match="the region of concept 'cat' lies outside of the mask"):
        run(pipe, **task(True), concepts=[Concept(name="cat", region=(0, 0, 30, 30))], method="regional")
    with pytest.raises(ValueError, match="give lora-composer reinit='off'"):
        run(pipe, **task(True), concepts=BOXED, method=LoraComposer(reinit="swap"))
    with pytest.raises(ValueError, match="guidance_rescale cannot be given for image-to-image"):
        run(pipe, **task(False), guidance_rescale=0.5)
    inpaints = ComposePipeline.from_pipe(for_inpainting(StableDiffusionInpaintPipeline))
    starts: list[dict[str, Any]] = [{}, {"image": IMAGE}]
    for given in starts:
        with pytest.raises(ValueError, match="made for inpainting: give image"):
            inpaints(PROMPT, concepts=[Concept(name="cat", lora=str(lora_file("sd", "cat")))], **given)


@TASKS
def test_a_compiled_text_encoder_gives_the_same(inpaints: bool) -> None:
    pipe, image = composer_of("sd"), {"image": IMAGE, **({"mask_image": MASK} if inpaints else {})}
    compiled = copy.copy(pipe)
    compiled.register_modules(text_encoder=torch.compile(pipe.text_encoder, backend="eager"))
    given: Any = {**SHORT, **image, "concepts": BOXED, "method": "regional", "output_type": "latent"}
    found, expected = (one(PROMPT, generator=seeded(1), **given).images for one in (compiled, pipe))
    assert_close(found, expected)
