"""Image-to-image and inpainting of transformers: diffusers' own without concepts; with them, equal to dense deltas."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from PIL import Image
from torch import Tensor

from all_transformers import MODULAR, TRANSFORMERS
from components import seeded
from flux_kontext import KONTEXT
from krea2 import KREA2
from lora_compose import ComposePipeline, Concept, Detailer, Draft, Regional, refine
from lora_compose.pipelines.scene.division import divided
from pairs import in_pairs, slow_but
from transformer_families import (
    BOXES,
    METHODS,
    TOKENS,
    Family,
    Places,
    dense_loras,
    merged,
    pipeline_with_concepts,
    plain_latents,
    shared_pipeline,
)

FAMILIES = {name: family for name, family in {**TRANSFORMERS, "kontext": KONTEXT}.items() if family.image_tasks}
TASKS = [(name, inpaints) for name, family in FAMILIES.items() for inpaints in family.image_tasks]
AGAIN = {("chroma", True), ("flux", False), ("z-image", False), ("qwen-image", True)}
"""The second task of those families that have two."""
ONE_EACH = [pytest.param(*it, marks=pytest.mark.slow) if it in AGAIN else it for it in TASKS]
INPAINTS = [name for name, inpaints in TASKS if inpaints]
PROMPT = "a sks cat and a zwx dog on grass"
IMAGE = Image.fromarray((np.random.default_rng(0).random((128, 128, 3)) * 255).astype("u1"))
PAINTED = (32, 32, 128, 112)
MASK = Image.new("L", (128, 128))
MASK.paste(255, PAINTED)
OUTSIDE = np.asarray(MASK) == 0
CALL: dict[str, Any] = {
    "prompt": PROMPT, "num_inference_steps": 4, "strength": 0.5, "max_sequence_length": TOKENS, "image": IMAGE,
}  # fmt: skip
DEFAULTS: dict[str, dict[str, float]] = {
    "anima": {"width": 128, "height": 128}, "chroma": {"width": 128, "height": 128},
    "flux": {"width": 128, "height": 128, "guidance_scale": 3.5}, "kontext": {"_auto_resize": False},
    "qwen-image": {"width": 128, "height": 128},
}  # fmt: skip
"""For families whose images get the size of the call, and which have another default for each task."""


@pytest.fixture(scope="module")
def pipes() -> dict[str, Any]:
    """A pipeline with two concepts for each family."""
    return {name: shared_pipeline(family) for name, family in FAMILIES.items()}


def task(name: str, inpaints: bool, **more: Any) -> dict[str, Any]:
    """Arguments of a call that starts from an image."""
    family: Family = FAMILIES[name]
    return {**CALL, **DEFAULTS.get(name, {}), **family.guided, **({"mask_image": MASK} if inpaints else {}), **more}


def latents_of(pipe: Any, **arguments: Any) -> Tensor:
    return pipe(**{"generator": seeded(3), "output_type": "latent", **arguments}).images


def plain(name: str, pipe: Any, inpaints: bool, **arguments: Any) -> Tensor:
    """What diffusers' pipeline for the task gives."""
    family = FAMILIES[name]
    return plain_latents(family, pipe, family.image_tasks[inpaints], **arguments)


@pytest.mark.parametrize(("name", "inpaints", "several"), in_pairs(TASKS, [False, True]))
def test_without_concepts_it_is_diffusers_own(pipes, name, inpaints, several):
    given = task(name, inpaints)
    if several:
        given |= {"prompt": [PROMPT, "a cat"], "generator": [seeded(1), seeded(2)], "image": [IMAGE, IMAGE.rotate(90)]}
        given |= {"negative_prompt": ["the photo"] * 2} if "negative_prompt" in given else {}
    ours = latents_of(pipes[name], **copy.deepcopy(given))
    assert torch.equal(ours, plain(name, pipes[name], inpaints, **copy.deepcopy(given)))


@pytest.mark.parametrize(("name", "inpaints", "method"), in_pairs(ONE_EACH, METHODS))
def test_a_method_equals_dense_deltas_one_concept_after_the_other(pipes, name, inpaints, method):
    settings, concepts, places = METHODS[method]
    family, pipe, given = FAMILIES[name], pipes[name], task(name, inpaints)
    found = latents_of(pipe, concepts=concepts, method=settings, **given)
    loras = [loaded.factors.model for loaded in pipe.resolve_concepts(["cat", "dog"])]

    def placed(rows: Sequence[bool]) -> Places:
        found = places(family, rows)
        nowhere = [torch.zeros_like(found.image)] if name == "kontext" else []  # on the image that it reads beside
        return replace(found, image=torch.cat([found.image, *nowhere], dim=1))

    with dense_loras(family, pipe.transformer, loras, placed, guided=True):
        expected = plain(name, pipe, inpaints, **given)
    torch.testing.assert_close(found, expected, atol=3e-5, rtol=0)


def outside(latents: Tensor) -> Tensor:
    """The latents outside of the mask; packed ones have one token for 2 x 2 of them."""
    cells = latents.transpose(1, 2).unflatten(2, (8, 8)) if latents.dim() == 3 else latents
    side = 128 // cells.shape[-1]
    return cells[..., torch.from_numpy(OUTSIDE[::side, ::side].copy())]


@pytest.mark.parametrize(("name", "method"), [("z-image", "switch"), ("flux", "composite"), ("kontext", "draft")])
def test_methods_with_their_own_passes_keep_what_is_outside_of_the_mask(pipes, name, method):
    given = task(name, True)
    found = latents_of(pipes[name], **given, concepts=["cat", "dog"], method=method)
    untouched = plain(name, pipes[name], True, **given)
    assert torch.equal(outside(found), outside(untouched))
    assert (found - untouched).abs().max() > 0.01


@pytest.mark.parametrize(("name", "how"), in_pairs(INPAINTS, [{"paste_original": True}, {"padding_mask_crop": 8}]))
def test_pixels_outside_of_the_mask_can_stay_those_of_the_image(pipes, name, how):
    given = task(name, True, concepts=["cat"], method="merge", output_type="pil", **how)
    (found,) = pipes[name](**given, generator=seeded(3)).images
    assert np.array_equal(np.asarray(found)[OUTSIDE], np.asarray(IMAGE)[OUTSIDE])
    assert (np.asarray(found)[~OUTSIDE] != np.asarray(IMAGE)[~OUTSIDE]).mean() > 0.5


@pytest.mark.parametrize("name", slow_but(["z-image"], INPAINTS))
def test_each_subject_is_repainted_alone(pipes, name):
    pipe, how = pipes[name], Detailer(strength=0.5, blur=0, padding=0.25)
    options = {"num_inference_steps": 2, "max_sequence_length": TOKENS, **FAMILIES[name].unguided}
    size, own = {"width": 128, "height": 128}, pipe.own_size
    output = pipe(prompt=PROMPT, concepts=[*BOXES[:1], "dog"], method="merge", generator=seeded(1), **size, **options)
    found = output.refine(how, generator=seeded(3))
    again = refine(pipe, output.images[0], PROMPT, [*BOXES[:1], "dog"], how=how, generator=seeded(3), **options)
    (alone,) = pipe(
        prompt="a sks cat on grass", concepts=["cat"], method="merge", image=output.images[0],
        mask_image=BOXES[0].region, strength=0.5, padding_mask_crop=32, generator=seeded(3), width=own[0],
        height=own[1], **options,
    ).images  # fmt: skip
    assert found.subjects == ("cat",)
    for one in (found.image, again.image):
        assert np.array_equal(np.asarray(one), np.asarray(alone))
    right = np.asarray(alone)[:, 64:]
    assert np.array_equal(right, np.asarray(output.images[0])[:, 64:])


@pytest.mark.parametrize(("name", "inpaints"), [task for task in TASKS if task[0] not in MODULAR])
def test_a_pipeline_for_the_task_becomes_one_that_composes(pipes, name, inpaints):
    theirs = FAMILIES[name].image_tasks[inpaints](**pipes[name].components)
    ours = ComposePipeline.from_pipe(theirs)
    assert type(ours) is type(pipes[name])
    if name != "kontext":  # without a name its configuration is that of FLUX.1
        assert ComposePipeline.family_of({**theirs.config}) is type(ours)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "another size": ({"width": 64}, "width and height are those of the image, 128 x 128"),
    "one pixel": ({"image": IMAGE.resize((1, 1)), "mask_image": None}, "this model needs at least 16"),
    "latents": ({"image": torch.zeros(1, 16, 16, 16)}, r"a tensor of torch.float32 with the shape \[1, 16"),
    "two masks": ({"mask_image": [MASK, MASK]}, "a list of 2 masks, and there are 1 prompts"),
    "strength 0": ({"strength": 0.0}, "strength=0 leaves none of the 4 steps"),
    "an empty mask": ({"mask_image": Image.new("L", (128, 128))}, "all black"),
    "a mask of another shape": ({"mask_image": MASK.resize((64, 128))}, "the same proportions"),
}  # fmt: skip


@pytest.mark.parametrize("concepts", [None, ["cat"]], ids=["plain", "concepts"])
@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_used_is_refused_with_words(pipes, case, concepts):
    wrong, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        pipes["z-image"](**task("z-image", True, concepts=concepts) | wrong)


def test_what_does_not_go_together_is_refused_with_words(pipes):
    flux = pipes["flux"]
    with pytest.raises(ValueError, match="latents cannot be given with an image"):
        flux(**task("flux", True, concepts=["cat"]), latents=torch.zeros(1, 4, 16, 16))
    with pytest.raises(ValueError, match="the region of concept 'cat' lies outside of the mask"):
        flux(**task("flux", True, concepts=[Concept(name="cat", region=(0, 0, 16, 16))], method="regional"))
    with pytest.raises(ValueError, match="padding_mask_crop cannot be given for inpainting"):
        pipes["z-image"](**task("z-image", True, padding_mask_crop=2))
    other = copy.copy(flux)
    other.scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    with pytest.raises(ValueError, match=r"a UniPCMultistepScheduler, FLUX.1 cannot start from an image; use"):
        other(**task("flux", False))


@pytest.mark.parametrize("concepts", [None, ["cat"]], ids=["plain", "concepts"])
def test_a_part_of_a_step_is_a_step_as_in_diffusers(pipes, concepts):
    seen = []

    def look(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(step)
        return tensors

    given = task("z-image", True, strength=0.1, concepts=concepts, output_type="latent")
    pipes["z-image"](**given, callback_on_step_end=look)
    assert seen == [0]
    assert pipes["z-image"].steps_from_image(4, 0.1, inpaints=True) == 1


@pytest.mark.parametrize(("name", "concepts"), [("flux", ["cat"]), ("z-image", ["cat"]), ("qwen-image", None)])
def test_each_prompt_may_have_a_mask(pipes, name, concepts):
    masks = [MASK, MASK.transpose(Image.Transpose.FLIP_TOP_BOTTOM)]
    several = {"prompt": [PROMPT, "a zwx dog and a sks cat"], "image": [IMAGE] * 2, "mask_image": masks}
    given = task(name, True, concepts=concepts, output_type="latent")
    words = {name: text for name, text in given.items() if name == "negative_prompt"}
    both = pipes[name](
        **given | several | {name: [text] * 2 for name, text in words.items()}, generator=[seeded(i) for i in range(2)]
    ).images
    for i in range(2):
        own = {"prompt": several["prompt"][i], "mask_image": masks[i], "generator": seeded(i)}
        torch.testing.assert_close(both[i : i + 1], pipes[name](**given | own).images, atol=2e-4, rtol=0)


def test_a_further_reference_image_is_for_inpainting_without_concepts(pipes):
    pipe, given = pipes["flux2"], task("flux2", True, output_type="latent")
    plain = pipe(**given, generator=seeded()).images
    assert not torch.equal(pipe(**given, generator=seeded(), image_reference=IMAGE.rotate(90)).images, plain)
    with pytest.raises(ValueError, match="further reference images cannot be combined with concepts"):
        pipe(**given, image_reference=IMAGE, concepts=["cat"])
    with pytest.raises(ValueError, match="image_reference goes with inpainting"):
        pipe(PROMPT, image_reference=IMAGE)


def placed_beside(image: float, reference: Tensor) -> Any:
    """Where the cat's LoRA acts: as strong as given in cells of the image and of the reference image."""

    def places(rows: Sequence[bool]) -> Places:
        found = merged(KONTEXT, rows)
        cat = torch.tensor([1.0, 0.0])
        beside = reference[:, None].expand(len(rows), -1, 2)
        return Places(found.text * cat, torch.cat([found.image * image, beside], dim=1) * cat, found.modulation * cat)

    return places


@pytest.mark.parametrize(("other", "acts"), in_pairs([None, IMAGE.resize((64, 96))], [False, True]))
def test_kontext_inpaints_beside_the_image_or_another_reference(pipes, other, acts):
    """A LoRA acts on the reference image only if the concept says so."""
    pipe, given = pipes["kontext"], task("kontext", True, image_reference=other)
    assert torch.equal(latents_of(pipe, **given), plain("kontext", pipe, True, **given))
    cat = [Concept(name="cat", references=acts)]
    found = latents_of(pipe, concepts=cat, method="merge", **given)
    (lora,) = (loaded.factors.model for loaded in pipe.resolve_concepts(["cat"]))
    beside = torch.full([64 if other is None else 4 * 6], float(acts))
    with dense_loras(KONTEXT, pipe.transformer, [lora], placed_beside(1.0, beside), guided=True):
        expected = plain("kontext", pipe, True, **given)
    torch.testing.assert_close(found, expected, atol=3e-5, rtol=0)


@pytest.mark.slow
def test_kontext_inpaints_at_a_size_that_it_knows(pipes):
    call = {
        "prompt": PROMPT, "image": IMAGE.resize((160, 120)), "mask_image": (40, 30, 160, 120), "num_inference_steps": 1,
        "max_sequence_length": TOKENS,
    }  # fmt: skip
    found = latents_of(pipes["kontext"], concepts=[Concept(name="cat", weight=0.0)], method="merge", **call)
    assert found.shape[1] == 1248 * 832 // 256
    mask = Image.new("L", (160, 120))
    mask.paste(255, (40, 30, 160, 120))
    expected = plain("kontext", pipes["kontext"], True, **{**call, "mask_image": mask})
    torch.testing.assert_close(found, expected, atol=3e-5, rtol=0)


@pytest.mark.parametrize("concepts", [None, ["cat"]], ids=["plain", "concepts"])
def test_kontext_refuses_sizes_that_inpainting_does_not_have(pipes, concepts):
    pipe, given = pipes["kontext"], task("kontext", True, concepts=concepts)
    assert pipe.size_from_start(640, 480) == (1184, 880)
    known = {**given, "_auto_resize": True, "image": IMAGE.resize((160, 120)), "mask_image": (40, 30, 160, 120)}
    with pytest.raises(ValueError, match="those of the image, 1248 x 832 as this model reads it; resize the image"):
        pipe(**known, width=160, height=112)
    with pytest.raises(ValueError, match="max_area is not read in inpainting, which is at 128 x 128 here; leave it"):
        pipe(**{**given, "max_area": 64 * 64})
    with pytest.raises(ValueError, match="image_reference goes with inpainting: give mask_image as well"):
        pipe(PROMPT, image_reference=IMAGE, concepts=concepts)


def test_kontext_crops_with_concepts_only(pipes):
    with pytest.raises(ValueError, match="gives back the part around the mask, and not the image with it; leave out"):
        pipes["kontext"](**task("kontext", True, padding_mask_crop=8))


@pytest.mark.parametrize(("name", "inpaints"), [("anima", False), ("kontext", True)])
def test_draft_from_an_image_is_regional_with_the_regions_found(pipes, name, inpaints, monkeypatch):
    found: list[Tensor] = []

    def kept(*arguments: Any) -> Tensor:
        found.append(divided(*arguments))
        return found[-1]

    monkeypatch.setattr("lora_compose.pipelines.methods.draft.divided", kept)
    given = task(name, inpaints)
    method = Draft(length=1, reading="scene", bias=0, isolate=0, token_mask="tara")
    drafted = latents_of(pipes[name], concepts=["cat", "dog"], method=method, **given)
    (masks,) = found
    images: Any = [np.kron(mask.numpy(), np.ones((8, 8))).astype(np.float32) for mask in masks]
    regions = [Concept(name=one, region=mask) for one, mask in zip(("cat", "dog"), images, strict=True)]
    same = Regional(texts="shared", isolate=0, token_mask="tara")
    expected = latents_of(pipes[name], concepts=regions, method=same, **given)
    torch.testing.assert_close(drafted, expected, atol=3e-5, rtol=0)


@pytest.mark.parametrize("concepts", [None, ["cat"]], ids=["plain", "concepts"])
def test_families_without_the_task_say_so(concepts, tmp_path):
    pipe = pipeline_with_concepts(KREA2, tmp_path)
    with pytest.raises(ValueError, match="diffusers has no inpainting for Krea 2; images are made from text only"):
        pipe(PROMPT, concepts=concepts, image=IMAGE, mask_image=MASK)
    with pytest.raises(ValueError, match="diffusers has no image-to-image for Krea 2"):
        pipe(PROMPT, concepts=concepts, image=IMAGE)


@pytest.mark.parametrize("name", [name for name in INPAINTS if name not in MODULAR])
def test_callbacks_of_inpainting_see_the_mask_and_no_tensor_that_only_unets_have(pipes, name):
    names, seen = ["latents", "mask"], []

    def look(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append({name: tensors[name].shape for name in names})
        return tensors

    given = {"concepts": ["cat"], "method": "merge", "callback_on_step_end": look}
    latents_of(pipes[name], **task(name, True), **given, callback_on_step_end_tensor_inputs=names)
    assert len(seen) == 2
    assert all(one["mask"] == (1, 1, *one["latents"][-2:]) for one in seen)
    more = {**given, "callback_on_step_end_tensor_inputs": [*names, "masked_image_latents"]}
    with pytest.raises(ValueError, match=r"callback_on_step_end_tensor_inputs.*masked_image_latents"):
        latents_of(pipes[name], **task(name, True), **more)
    assert len(seen) == 2
