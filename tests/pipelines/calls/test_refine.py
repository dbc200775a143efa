"""The detailer: each subject is repainted alone, and nothing changes outside of its mask."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from components import seeded
from composing import BOXED, PROMPT, composer_of
from lora_compose import Concept, Detailer, refine, subject_masks

IMAGE = Image.fromarray((np.random.default_rng(0).random((128, 128, 3)) * 255).astype("u1"))
STEPS: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 4.0}


def pixels(image: Image.Image) -> np.ndarray:
    """As numbers."""
    return np.asarray(image).astype(int)


def test_each_subject_is_inpainting_with_its_own_text_and_lora():
    pipe, generator = composer_of("sd"), seeded(3)
    found = refine(pipe, IMAGE, PROMPT, BOXED, how=Detailer(blur=0, padding=0.25), **STEPS, generator=seeded(3))
    image = IMAGE
    for text, name, box in (("a sks cat", "cat", (0, 0, 64, 128)), ("a zwx dog", "dog", (64, 0, 128, 128))):
        output = pipe(
            text, concepts=[name], method="tara", image=image, mask_image=box, strength=0.5, padding_mask_crop=32,
            **STEPS, generator=generator,
        )  # fmt: skip
        (image,) = output.images
    assert np.array_equal(pixels(found.image), pixels(image))
    assert found.subjects == ("cat", "dog")
    assert found.cost.rows_forward == 4  # one of two steps, with guidance, for each subject


def test_nothing_changes_outside_of_the_masks_and_borders_fade_inwards():
    mask = Image.new("L", (128, 128))
    mask.paste(255, (20, 30, 80, 100))
    found = refine(composer_of("sd"), IMAGE, PROMPT, ["cat", "dog"], {"cat": mask}, Detailer(blur=0.1), **STEPS)
    change = np.abs(pixels(found.image) - pixels(IMAGE)).max(axis=-1)
    assert found.subjects == ("cat",)
    assert not change[np.asarray(mask) == 0].any()
    assert change[60:70, 45:55].mean() > 2 * change[60:70, 20:22].mean()


def test_masks_of_a_run_become_the_boxes_around_them():
    masks = torch.zeros(3, 8, 8, dtype=torch.bool)
    masks[0, 2:4, 1:3] = masks[2, :, :] = True
    concepts = [Concept(name="cat"), Concept(name="dog"), Concept(name="paint", role="style")]
    found = subject_masks(masks, concepts, (128, 64))
    assert found.keys() == {"cat"}
    assert found["cat"].size == (128, 64)
    assert found["cat"].getbbox() == (16, 16, 48, 32)


def test_what_cannot_be_repainted_is_refused():
    pipe = composer_of("sd")
    with pytest.raises(ValueError, match="it is not known where the subjects are"):
        refine(pipe, IMAGE, PROMPT, ["cat", "dog"])
    with pytest.raises(ValueError, match=r"masks name \['bear'\]; the subjects are cat, dog"):
        refine(pipe, IMAGE, PROMPT, ["cat", "dog"], {"bear": (0, 0, 64, 64)})
    with pytest.raises(ValueError, match="strength must be above 0"):
        Detailer(strength=0)
    with pytest.raises(ValueError, match="padding is a share"):
        Detailer(padding=-1)


def test_an_output_repaints_its_own_subjects():
    pipe = composer_of("sd")
    one = {"num_inference_steps": 1, "guidance_scale": 4.0}
    how = Detailer(strength=1.0)
    output = pipe(PROMPT, concepts=BOXED, method="merge", generator=seeded(1), **one)
    expected = refine(pipe, output.images[0], PROMPT, BOXED, how=how, generator=seeded(3), **one)
    found = output.refine(how, generator=seeded(3))
    assert found.subjects == ("cat", "dog")
    assert np.array_equal(pixels(found.image), pixels(expected.image))
    with pytest.raises(ValueError, match="make the image with record_attention=True"):
        pipe(PROMPT, concepts=["cat", "dog"], method="merge", **one).refine()
    with pytest.raises(ValueError, match="not of an image"):
        pipe(PROMPT, concepts=["cat", "dog"], method="merge", image=IMAGE, strength=1.0, **one).refine()


def test_an_output_repaints_subjects_in_their_regions_and_others_in_their_masks():
    pipe, how = composer_of("sd"), Detailer(strength=1.0)
    sets = [Concept(name="cat", region=(0, 0, 64, 128)), Concept(name="dog")]
    one: dict[str, Any] = {"num_inference_steps": 1, "guidance_scale": 4.0}
    output = pipe(PROMPT, concepts=sets, method="draft", record_attention=True, generator=seeded(1), **one)
    masks = subject_masks(output.masks[0, 0], sets, (128, 128))
    expected = refine(
        pipe, output.images[0], PROMPT, sets, {"dog": masks["dog"]}, how, generator=seeded(3), **one
    )  # fmt: skip
    found = output.refine(how, generator=seeded(3))
    assert found.subjects == expected.subjects == ("cat", "dog")
    assert np.array_equal(pixels(found.image), pixels(expected.image))


def test_an_output_of_several_prompts_repaints_each_image_by_its_own_prompts_concepts_and_masks():
    pipe = composer_of("sd")
    prompts, negative = [PROMPT, "a sks cat"], ["blurry", "dark"]
    sets = [[Concept(name="cat", weight=0.5), "dog"], [Concept(name="cat", weight=0.9)]]
    output = pipe(
        prompts, concepts=sets, method="merge", negative_prompt=negative, record_attention=True, generator=seeded(1),
        **STEPS,
    )  # fmt: skip
    (mask,) = subject_masks(output.masks[1, 1, 2:], [Concept(name="cat")], (128, 128)).values()
    how = Detailer(strength=1.0)
    found = output.refine(how, image=1, generator=seeded(3))
    expected = refine(
        pipe, output.images[1], prompts[1], sets[1], {"cat": mask}, how, negative_prompt="dark", generator=seeded(3),
        **STEPS,
    )  # fmt: skip
    assert found.subjects == ("cat",)
    assert np.array_equal(pixels(found.image), pixels(expected.image))
