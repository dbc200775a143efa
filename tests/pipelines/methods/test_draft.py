"""Draft against independent references: maps of plain diffusers, and methods that are given the boxes found."""

import logging
import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
)
from PIL import Image
from torch import Tensor

from comparisons import assert_close, far_apart
from components import random_lora, save_lora, seeded, small_pipeline, text_loras, tiny_pipeline, with_library
from composing import ALL_LEVELS
from lora_compose.pipelines.methods import Draft, LoraComposer, Merge
from lora_compose.pipelines.methods.draft import draft_only
from lora_compose.pipelines.methods.drafted import reordered
from lora_compose.pipelines.methods.region_bias import region_bias
from lora_compose.pipelines.methods.regional import Regional
from lora_compose.pipelines.scene.division import centres_of, clusters, divided, nearest, spacing, strips
from lora_compose.pipelines.scene.rows import Rows
from lora_compose.pipelines.scene.scene import Concept
from lora_compose.pipelines.text.conditioning import Conditioning
from pairs import slow_but

PROMPT = "a sks cat and a zwx dog on grass"
BASE, NOUNS = "a cat and a dog on grass", (2, 5)  # positions counted by hand; 0 is the start token
CATS = "a sks cat and a zwx cat on grass"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Any]:
    """The concepts "cat" and "dog", and "kitten", whose class is that of the cat."""

    @cache
    def made(whole: bool) -> Any:
        pipe, folder = (small_pipeline if whole else tiny_pipeline)(), tmp_path_factory.mktemp("loras")
        for seed, (name, trigger, noun) in enumerate(
            (("cat", "sks", "cat"), ("dog", "zwx", "dog"), ("kitten", "zwx", "cat"), ("bear", "xlo", "bear"))
        ):
            parts = {"unet": random_lora(pipe.unet, seed, size=0.2), **text_loras(pipe, seed, size=0.2)}
            file = save_lora(folder / f"{name}.safetensors", **parts)
            pipe.load_concept(file, name, trigger=trigger, class_word=noun)
        return pipe.library

    return made


@pytest.fixture
def composer(pipe, whole, library) -> Any:
    return with_library(pipe, library(whole))


def call(pipe: Any, concepts: Sequence[Any] = ("cat", "dog"), prompt: Any = PROMPT, **arguments: Any) -> Any:
    given: dict[str, Any] = {
        "num_inference_steps": 2,
        "output_type": "latent",
        "generator": seeded(),
        "method": Draft(),
    }
    return pipe(prompt, concepts=list(concepts), **given | arguments)


def boxes_of(masks: Tensor) -> list[tuple[int, int, int, int]]:
    """Masks on the latent grid that are rectangles, as boxes in pixels. Shape: [subjects, height, width]."""
    boxes = []
    for mask in masks:
        rows, columns = mask.any(dim=1).nonzero()[:, 0], mask.any(dim=0).nonzero()[:, 0]
        top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
        assert mask[top:bottom, left:right].all()
        boxes.append((left * 8, top * 8, right * 8, bottom * 8))
    return boxes


class Dividing:
    """Keeps how the canvas is divided."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.masks: list[Tensor] = []
        self.maps: list[Tensor] = []

        def kept(maps: Tensor, *arguments: Any) -> Tensor:
            self.maps.append(maps)
            self.masks.append(divided(maps, *arguments))
            return self.masks[-1]

        monkeypatch.setattr("lora_compose.pipelines.methods.draft.divided", kept)


@pytest.fixture
def dividing(monkeypatch) -> Dividing:
    return Dividing(monkeypatch)


def plain_maps(pipe: Any, steps: int, of: int, guidance: float) -> Tensor:
    """The mean attention to the nouns over some steps of plain diffusers. Shape: [2, 4, 4]."""
    scheduler, unet = pipe.scheduler, pipe.unet
    scheduler.set_timesteps(of)
    cond, uncond = pipe.encode_prompt(BASE, "cpu", 1, True)
    latents, found = torch.randn(1, 4, 16, 16, generator=seeded()) * scheduler.init_noise_sigma, []
    for t in scheduler.timesteps[:steps]:
        taken: dict[str, Tensor] = {}
        hooks = [
            module.register_forward_hook(lambda _, __, out, name=name, to=taken: to.__setitem__(name, out[-1:]))
            for name, module in unet.named_modules()
            if name.endswith(("attn2.to_q", "attn2.to_k"))
        ]
        rows = scheduler.scale_model_input(torch.cat([latents] * 2), t)
        with torch.no_grad():
            output = unet(rows, t, torch.cat([uncond, cond]), return_dict=False)[0]
        for hook in hooks:
            hook.remove()
        for name, query in taken.items():
            if name.endswith("to_q") and query.shape[1] == 16:
                heads: Any = unet.get_submodule(name.removesuffix(".to_q")).heads
                q, k = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (query, taken[name[:-1] + "k"]))
                attention = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(dim=-1).mean(dim=(0, 1))
                found.append(attention[:, list(NOUNS)].T.unflatten(1, (4, 4)))
        guided = output[:1] + guidance * (output[1:] - output[:1])
        latents = scheduler.step(guided, t, latents, return_dict=False)[0]
    return torch.stack(found).mean(dim=0)


@ALL_LEVELS
@pytest.mark.parametrize(
    ("length", "drafted"),
    [(0.3, 2), (2, 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((0.6, 3), (0.01, 1)))],
)
def test_the_maps_are_those_of_plain_diffusers_in_the_first_steps(composer, plain_pipe, dividing, length, drafted):
    call(composer, method=Draft(length=length), num_inference_steps=4, guidance_scale=4.0)
    torch.testing.assert_close(dividing.maps[0], plain_maps(plain_pipe, drafted, 4, 4.0), atol=1e-5, rtol=1e-4)


def test_the_maps_of_the_draft_are_recorded_with_those_of_the_steps(composer, dividing):
    output = call(composer, ("dog", "bear", "cat"), prompt=PROMPT + " beside a xlo bear", record_attention=[0])
    torch.testing.assert_close(output.draft_maps, dividing.maps[0][None])
    assert call(composer).draft_maps is None
    boxes = [Concept(name="cat", region=(0, 0, 64, 128)), Concept(name="dog", region=(64, 0, 128, 128))]
    assert call(composer, boxes, record_attention=True).draft_maps is None


def test_the_maps_of_the_draft_stand_where_their_images_and_concepts_are(composer, dividing):
    concepts: Any = [["cat", "dog"], ["bear", "cat"]]
    prompts = [PROMPT, "a xlo bear and a sks cat on grass"]
    output = call(composer, concepts, prompt=prompts, record_attention=[0], generator=[seeded(), seeded(1)])
    names = ["cat", "dog", "bear"]
    for image, of_set in enumerate(concepts):
        found = {name: output.draft_maps[image, names.index(name)] for name in names}
        for name, maps in zip(of_set, dividing.maps[image], strict=True):
            torch.testing.assert_close(found.pop(name), maps)
        assert not any(maps.any() for maps in found.values())


SCHEDULERS = [
    DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler, HeunDiscreteScheduler, LCMScheduler,
]  # fmt: skip


@pytest.mark.parametrize("scheduler", slow_but([None, *SCHEDULERS[:2]], [None, *SCHEDULERS]))
def test_nothing_of_the_draft_is_left_when_the_image_starts_again(composer, dividing, tmp_path, scheduler):
    """It is the image of `regional` with the masks found, from the same noise with the same noise of every step."""
    if scheduler is not None:
        composer.scheduler = scheduler.from_config(composer.scheduler.config)
    found = call(composer, method=Draft(length=2, bias=0)).images
    concepts = []
    for name, mask in zip(("cat", "dog"), dividing.masks[0], strict=True):
        assert mask.any()
        Image.fromarray(mask.bool().repeat_interleave(8, 0).repeat_interleave(8, 1).numpy()).save(
            tmp_path / f"{name}.png"
        )
        concepts.append(Concept(name=name, region=str(tmp_path / f"{name}.png")))
    assert torch.equal(found, call(composer, concepts, method="regional").images)


def test_an_image_that_continues_from_the_draft_has_its_first_steps_and_no_warning(composer, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    composer.scheduler = EulerAncestralDiscreteScheduler.from_config(composer.scheduler.config)
    bystander = Concept(name="plain cat", role="bystander", class_word="cat")  # has no LoRA

    def after_each_step(**given: Any) -> list[Tensor]:
        after: list[Tensor] = []

        def keep(_pipe: Any, _step: int, _t: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
            after.append(values["latents"].clone())
            return {}

        call(composer, num_inference_steps=4, callback_on_step_end=keep, **given)
        return after

    drafted = after_each_step(method=Draft(length=3, restart="never"))
    assert not [record for record in caplog.records if record.name.startswith("diffusers")]
    plain = after_each_step(prompt=BASE, concepts=[bystander], method="merge")
    for ours, base in zip(drafted[:2], plain[:2], strict=True):
        torch.testing.assert_close(ours, base)
    assert not torch.allclose(drafted[2], plain[2]), "LoRAs act from here on"


def test_a_generator_of_pytorch_itself_is_left_alone(composer):
    composer.scheduler = EulerAncestralDiscreteScheduler.from_config(composer.scheduler.config)
    after = []
    for method in (Draft(), Merge()):
        torch.manual_seed(3)
        call(composer, method=method, generator=None)
        after.append(torch.get_rng_state())
    assert torch.equal(*after)


def test_two_of_one_class_read_the_scene(composer):
    found = call(composer, ("cat", "kitten"), CATS, method=Draft()).images
    assert torch.equal(found, call(composer, ("cat", "kitten"), CATS, method=Draft(reading="scene")).images)
    assert far_apart(found, call(composer, ("cat", "kitten"), CATS, method=Draft(reading="regions")).images)


def test_regions_that_read_texts_of_their_own_start_apart(composer, dividing):
    settings = Draft(reading="regions", apart=0.5)
    found = call(composer, ("cat", "kitten"), CATS, method=settings).images
    boxes = boxes_of(dividing.masks[0])
    concepts = [Concept(name=n, region=box) for n, box in zip(("cat", "kitten"), boxes, strict=True)]
    alike = LoraComposer(step_size=0, threshold=0.5, apart=0.5)
    assert_close(found, call(composer, concepts, CATS, method=alike).images)


def test_regions_are_isolated_in_a_part_of_the_steps_from_the_first(composer):
    def steps(isolate: float) -> list[Tensor]:
        kept: list[Tensor] = []

        def keep(_pipe: Any, _step: int, _t: Any, values: dict[str, Any]) -> dict[str, Any]:
            kept.append(values["latents"])
            return values

        method = Draft(reading="regions", apart=0, isolate=isolate)
        call(composer, method=method, num_inference_steps=4, callback_on_step_end=keep)
        return kept

    always, half, never = steps(1), steps(0.5), steps(0)
    assert torch.equal(torch.stack(half[:2]), torch.stack(always[:2]))
    assert far_apart(half[2], always[2])
    assert far_apart(half[0], never[0])


def test_texts_of_subjects_leave_the_scene_out(composer):
    own = [Concept(name="cat", prompt="a sks cat"), Concept(name="dog", prompt="a zwx dog")]
    found = call(composer, method=Draft(reading="subjects")).images
    assert torch.equal(found, call(composer, own, method=Draft(reading="regions")).images)
    assert far_apart(found, call(composer, method=Draft(reading="regions")).images)


def test_a_prompt_of_its_own_is_read(composer):
    own = Concept(name="cat", prompt="a sks cat with a hat")
    found, shared = call(composer, (own, "dog")).images, call(composer, method=Draft(reading="regions")).images
    assert torch.equal(found, call(composer, (own, "dog"), method=Draft(reading="regions")).images)
    assert far_apart(found, shared)
    negative = Concept(name="cat", negative_prompt="blurry")
    assert far_apart(call(composer, (negative, "dog")).images, shared)


@ALL_LEVELS
def test_a_given_region_is_kept_and_the_rest_is_found_around_it(composer, dividing):
    box = Concept(name="cat", region=(0, 0, 48, 128))
    output = call(composer, (box, "dog", "bear"), f"{PROMPT} beside a xlo bear", record_attention=True)
    cat, dog, bear = dividing.masks[0]
    assert boxes_of(cat[None]) == [box.region]
    assert (cat + dog + bear == 1).all()
    assert dog.any()
    assert bear.any()
    assert output.masks.shape == (2, 1, 3, 4, 4)
    with pytest.raises(ValueError, match="leave 0 cells of the latents for dog"):
        call(composer, (Concept(name="cat", region=(0, 0, 128, 128)), "dog"))


def test_every_subject_gets_a_cell_as_long_as_there_are_enough():
    """Nine in a row of eight cells, two of them at one place, and nine on nine cells."""
    subjects = [Concept(name=f"c{i}") for i in range(9)]
    for divide in (strips, nearest):
        for grid in ((8, 8), (3, 3)):
            maps = torch.rand(9, *grid, generator=seeded())
            maps[1] = maps[0]
            masks = divided(maps, subjects, [torch.zeros(grid, dtype=torch.bool)] * 9, divide, 0.5)
            assert masks.flatten(1).any(dim=1).all()
            assert (masks.sum(dim=0) == 1).all()
        with pytest.raises(ValueError, match=r"leave 4 cells of the latents for c0, .*fewer concepts"):
            divided(torch.rand(9, 2, 2), subjects, [torch.zeros(2, 2, dtype=torch.bool)] * 9, divide, 0.5)


def test_with_a_region_for_each_subject_nothing_is_drafted(composer):
    concepts = [Concept(name="cat", region=(0, 0, 64, 128)), Concept(name="dog", region=(64, 0, 128, 128))]
    drafted, given = (call(composer, concepts, method=method) for method in (Draft(bias=0), "regional"))
    assert torch.equal(drafted.images, given.images)
    assert drafted.cost.rows_forward == given.cost.rows_forward
    found = call(composer, concepts, method=Draft(keep_regions=False))
    assert torch.equal(found.images, call(composer).images)


@ALL_LEVELS
def test_the_bias_draws_cells_to_the_words_of_their_subject(composer):
    concepts = [Concept(name="cat", region=(0, 0, 64, 128)), Concept(name="dog", region=(64, 0, 128, 128))]
    maps = {
        bias: call(composer, concepts, method=Draft(bias=bias), record_attention=[0]).attention_maps[0, 0]
        for bias in (0.0, 2.0)
    }
    change = maps[2.0] / maps[0.0]
    own, other = torch.stack([change[0, :, :2], change[1, :, 2:]]), torch.stack([change[0, :, 2:], change[1, :, :2]])
    assert own.min() > 1.5
    assert other.max() < 0.6


@pytest.mark.parametrize("branches", [1, 2])
def test_the_bias_is_that_of_every_cell_and_token(branches):
    generator = seeded()
    shares = torch.rand(2, 5, 3, generator=generator)
    phrases = (torch.rand(2, 4, 3, generator=generator) > 0.5).float()
    empty = torch.zeros(2 * branches, 4, 3)
    text = Conditioning(torch.zeros(2 * branches, 4, 8), empty, empty, Rows.of(2, branches - 1))
    for on_all_rows in (False, True):
        bias = region_bias(text, {1: shares}, phrases, 2.0, -1.0, on_all_rows=on_all_rows)
        found = bias.scores()[1]
        assert found.shape == (2 * branches, 5, 4)
        for row, cell, token in product(range(2 * branches), range(5), range(4)):
            image, wanted = row % 2, 0.0
            for here, named in product(range(3), range(3)):
                size = 2.0 if here == named else -1.0
                wanted += size * float(shares[image, cell, here] * phrases[image, token, named])
            unconditional = row < 2 * (branches - 1) and not on_all_rows
            assert float(found[row, cell, token]) == pytest.approx(0.0 if unconditional else wanted, abs=1e-5)


@pytest.mark.parametrize(("prompt", "concepts"), [(PROMPT, ("cat", "dog")), (CATS, ("cat", "kitten"))])
def test_the_images_of_a_batch_are_those_of_calls_of_their_own(composer, prompt, concepts):
    together = call(composer, concepts, [prompt] * 2, generator=[seeded(0), seeded(1)]).images
    for image, seed in zip(together, (0, 1), strict=True):
        alone = call(composer, concepts, prompt, generator=seeded(seed)).images[0]
        torch.testing.assert_close(image, alone, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("steps", "guidance"), [(1, 0.0), (1, 4.0), (4, 1.0), (9, 4.0)])
def test_it_works_with_few_steps_and_without_guidance(composer, steps, guidance):
    output = call(composer, num_inference_steps=steps, guidance_scale=guidance)
    assert output.images.isfinite().all()
    rows, drafted = 2 if guidance > 1 else 1, max(1, math.ceil(round(0.12 * steps, 6)))
    assert output.cost.rows_forward == rows * (steps + drafted - 1)
    assert output.cost.rows_stopped == 1


def test_prompts_with_other_concept_sets_give_the_images_of_separate_calls(composer):
    composer.scheduler = EulerAncestralDiscreteScheduler.from_config(composer.scheduler.config)
    prompts, sets = [PROMPT, CATS], [["cat", "dog"], ["cat", "kitten"]]
    together = call(composer, sets, prompts, generator=[seeded(0), seeded(1)]).images
    for row in range(2):
        alone = call(composer, sets[row], prompts[row], generator=[seeded(row)]).images[0]
        torch.testing.assert_close(together[row], alone, atol=1e-3, rtol=1e-3)


def test_a_single_subject_is_merged_and_embeddings_are_refused(composer):
    assert torch.equal(
        call(composer, ("cat",), "a sks cat").images, call(composer, ("cat",), "a sks cat", method="merge").images
    )
    boxed = [Concept(name="cat", region=(0, 0, 64, 128))]
    draft, regional = (
        call(composer, boxed, "a sks cat", method=method(token_mask="image")).images for method in (Draft, Regional)
    )
    assert torch.equal(draft, regional)
    cond, _ = composer.encode_prompt(PROMPT, "cpu", 1, False)
    with pytest.raises(ValueError, match="needs prompts, not prompt_embeds"):
        call(composer, prompt=None, prompt_embeds=cond, guidance_scale=1.0)


def test_maps_of_other_layers_are_taken_by_their_names(composer):
    both, down, up = (
        call(composer, method=Draft(layers=start), record_attention=[0]).draft_maps
        for start in (None, "down_blocks", "up_blocks")
    )
    assert not torch.allclose(down, up, rtol=0.01)
    assert torch.equal(both, call(composer, method=Draft(layers=""), record_attention=[0]).draft_maps)
    for start in ("single", "up_block"):  # nor is transformer_blocks.10 one of transformer_blocks.1
        with pytest.raises(ValueError, match=f"no attention layer begins with '{start}'; there are down_blocks"):
            call(composer, method=Draft(layers=start))


# Several drafts


NOISE = torch.randn(1, 4, 16, 16, generator=seeded(5))
PAIR = [Concept(name=name, class_word=name) for name in ("cat", "dog")]
NO_REGIONS = [torch.zeros(16, 16, dtype=torch.bool)] * 2


def space_of(output: Any) -> float:
    return spacing(output.draft_maps[0], PAIR, NO_REGIONS, 0.3)


def test_of_several_drafts_the_one_with_most_space_is_taken(composer):
    each = [NOISE, *(reordered(NOISE, turn) for turn in (1, 2))]
    alone = [call(composer, latents=noise, record_attention=[0]) for noise in each]
    best = max(alone, key=space_of)
    assert best is not alone[0], "or nothing is shown"
    found = call(composer, latents=NOISE, method=Draft(drafts=3, spacing=9), record_attention=[0])
    assert_close(found.images, best.images)
    assert_close(found.draft_maps, best.draft_maps)
    assert found.cost.rows_stopped == 3, "one of each draft"


def test_there_is_no_further_draft_once_there_is_enough_space(composer):
    first = call(composer, latents=NOISE, record_attention=[0])
    found = call(composer, latents=NOISE, method=Draft(drafts=3, spacing=space_of(first) - 1e-3))
    assert torch.equal(found.images, first.images)
    assert found.cost.rows_stopped == 1
    given = {"prompt": PROMPT, "concepts": ["cat", "dog"], "num_inference_steps": 4}
    assert composer.plan(**given, method=Draft(drafts=3)).cost.rows_stopped == 3, "the most that it may cost"


def test_each_image_of_a_batch_has_as_many_drafts_as_it_needs(composer):
    composer.scheduler = EulerAncestralDiscreteScheduler.from_config(composer.scheduler.config)
    method = Draft(length=2, drafts=4, spacing=0.7)
    together = call(composer, prompt=[PROMPT] * 2, method=method, generator=[seeded(0), seeded(1)])
    rows = 0.0
    for image, seed in enumerate((0, 1)):
        alone = call(composer, method=method, generator=[seeded(seed)])
        torch.testing.assert_close(together.images[image], alone.images[0], atol=1e-3, rtol=1e-3)
        rows += alone.cost.rows_stopped
    assert together.cost.rows_stopped == rows > 2


def test_noise_in_another_order_is_the_same_values(composer):
    orders = [reordered(NOISE, turn) for turn in (1, 2, 1)]
    assert torch.equal(orders[0], orders[2])
    assert not torch.equal(orders[0], orders[1])
    for order in orders:
        cells = {tuple(cell) for cell in order[0].flatten(1).T.tolist()}
        assert cells == {tuple(cell) for cell in NOISE[0].flatten(1).T.tolist()}


def test_several_drafts_need_noise_to_start_from(composer):
    image = Image.new("RGB", (128, 128), "gray")
    with pytest.raises(ValueError, match="draft drafts=1, or the call strength=1"):
        call(composer, image=image, strength=0.5, method=Draft(drafts=2))


@pytest.mark.parametrize(("field", "value", "message"), [
    ("drafts", 0, "drafts must be a whole number, at least 1"),
    ("drafts", 1.5, "drafts must be a whole number, at least 1"),
    ("spacing", -1.0, "spacing must be at least 0"),
    ("leftover", 1, "leftover must be at least 0 and below 1"),
    ("token_mask", "some", "token_mask must be one of auto, tara, all, phrase, others, image, none"),
    ("length", 0, "length must be positive"),
    ("threshold", 1.0, "threshold must be at least 0 and below 1"),
    ("apart", 2, "apart must lie between 0 and 1"),
    ("division", "circles", "division must be one of auto, strips, nearest"),
    ("reading", "nothing", "reading must be one of auto, scene, regions, subjects"),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        Draft(**{field: value})


# Dividing the canvas


def bump(down: int, across: int, height: int = 8, width: int = 8, size: float = 1.5) -> Tensor:
    """A map that is highest at a cell."""
    ys, xs = torch.meshgrid(torch.arange(height) - down, torch.arange(width) - across, indexing="ij")
    return torch.exp(-(ys.square() + xs.square()) / size**2)


def test_a_subject_is_where_the_attention_to_it_is():
    maps = torch.stack([bump(2, 1), bump(5, 6) + 0.4 * bump(2, 1)])
    assert_close(centres_of(maps, ["cat", "dog"], 0.3), torch.tensor([[2.5, 1.5], [5.5, 6.5]]) / 8, 0.05)


def test_two_of_one_class_are_where_the_blobs_of_both_are_from_left_to_right():
    both = bump(6, 6) + 0.8 * bump(1, 1)
    centres = centres_of(torch.stack([both, 0.9 * both, bump(6, 1)]), ["cat", "cat", "dog"], 0.3)
    assert_close(centres, torch.tensor([[1.5, 1.5], [6.5, 6.5], [6.5, 1.5]]) / 8, 0.06)


def test_clusters_of_one_point_are_all_there():
    assert torch.equal(clusters(torch.tensor([[0.5, 0.2]]), torch.ones(1), 3), torch.tensor([[0.5, 0.2]] * 3))


@pytest.mark.parametrize("divide", [strips, nearest])
def test_every_free_cell_has_one_owner_and_every_owner_cells(divide):
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        centres, free = torch.rand(3, 2, generator=generator), torch.ones(16, 24)
        masks = divide(centres, free)
        assert (masks.sum(dim=0) == free).all()
        if divide is strips:
            assert (masks.flatten(1).sum(dim=1) >= 16 * 24 / 3 * 0.5).all()


def test_strips_are_columns_or_rows_half_way_between_centres():
    side_by_side = strips(torch.tensor([[0.4, 0.75], [0.6, 0.25]]), torch.ones(8, 8))
    assert boxes_of(side_by_side) == [(32, 0, 64, 64), (0, 0, 32, 64)]
    stacked = strips(torch.tensor([[0.2, 0.5], [0.8, 0.4]]), torch.ones(8, 8))
    assert boxes_of(stacked) == [(0, 0, 64, 32), (0, 32, 64, 64)]
    narrow = strips(torch.tensor([[0.5, 0.02], [0.5, 0.1]]), torch.ones(8, 20))
    assert boxes_of(narrow) == [(0, 0, 56, 64), (56, 0, 160, 64)]  # 0.35 of 20 cells are 7


def test_strips_divide_what_is_free_and_leave_no_subject_without_a_cell():
    free = torch.ones(8, 16)
    free[:, :8] = 0  # a given region
    centres = torch.tensor([[0.5, 0.1], [0.5, 0.9]])  # the first in the middle of it
    assert boxes_of(strips(centres, free)) == [(64, 0, 88, 64), (88, 0, 128, 64)]


def test_the_nearest_centre_owns_a_cell():
    masks = nearest(torch.tensor([[0.25, 0.25], [0.25, 0.75], [0.75, 0.5]]), torch.ones(8, 8))
    owner = masks.argmax(dim=0)
    assert owner[0, 0] == 0
    assert owner[0, 7] == 1
    assert owner[7, 4] == 2


def test_cells_that_no_map_covers_are_left_to_nobody():
    maps, none = torch.stack([bump(2, 2), bump(6, 5)]), [torch.zeros(8, 8, dtype=torch.bool)] * 2
    whole = divided(maps, PAIR, none, nearest, 0.3)
    left = divided(maps, PAIR, none, nearest, 0.3, None, 0.2)
    assert (left <= whole).all()
    assert left[0, 2, 2] == left[1, 6, 5] == 1
    assert left[:, 0, 7].sum() == left[:, 7, 0].sum() == 0
    sharp, fine = torch.stack([bump(1, 1, 4, 4, 0.5), bump(2, 2, 4, 4, 0.5)]), NO_REGIONS
    highest = divided(sharp, PAIR, fine, nearest, 0.3, None, 0.98)
    assert (highest.sum(dim=(1, 2)) < divided(sharp, PAIR, fine, nearest, 0.3).sum(dim=(1, 2))).all()
    flat = divided(torch.ones(2, 8, 8), PAIR, none, nearest, 0.3, None, 1.0)
    assert flat.flatten(1).any(dim=1).all(), "a subject that would have no cell keeps its part"


def test_the_space_between_subjects_is_measured_in_parts_of_the_canvas():
    maps, none = torch.stack([bump(3, 1), bump(3, 6)]), [torch.zeros(8, 8, dtype=torch.bool)] * 2
    assert spacing(maps, PAIR, none, 0.3) == pytest.approx(5 / math.sqrt(32), abs=0.05)
    given = [torch.ones(8, 8, dtype=torch.bool), none[0]]
    assert spacing(maps, PAIR, given, 0.3) == math.inf


@ALL_LEVELS
def test_in_cells_left_over_no_lora_acts_and_the_bias_is_against_the_words_of_all(composer, dividing):
    maps = {}
    for bias in (0.0, 2.0):
        method = Draft(bias=bias, leftover=0.999)
        output = call(composer, method=method, num_inference_steps=4, record_attention=[0])
        maps[bias] = output.attention_maps[0, 0]
    masks = dividing.masks[0]
    assert (masks.sum(dim=0) == 0).any()
    outside = (torch.nn.functional.avg_pool2d(masks.sum(dim=0)[None], 4)[0] == 0)[None].expand(2, -1, -1)
    change = maps[2.0] / maps[0.0]
    assert outside.any()
    assert change[outside].max() < 1, "cells of a region would be drawn to one of the two"


def test_given_regions_that_overlap_leave_nothing_over(composer):
    given = [Concept(name="cat", region=(0, 0, 128, 128)), Concept(name="dog", region=(0, 0, 128, 128))]
    found, whole = (call(composer, given, method=Draft(leftover=leftover)).images for leftover in (0.2, 0))
    assert_close(found, whole)


@ALL_LEVELS
@pytest.mark.parametrize("division", slow_but(["strips"], ["strips", "nearest"]))
def test_with_a_mask_image_what_is_painted_is_divided(composer, dividing, division):
    given = {"image": Image.new("RGB", (128, 128), "gray"), "mask_image": (64, 0, 128, 128), "strength": 1.0}
    output = call(composer, method=Draft(division=division), record_attention=True, **given)
    masks = dividing.masks[0]
    assert (masks.sum(dim=0)[:, 8:] == 1).all()
    assert not masks[:, :, :8].any()
    assert masks.any(dim=(1, 2)).all()
    assert output.masks.shape == (2, 1, 2, 4, 4)


def test_what_stays_of_an_image_is_there_in_the_draft(composer, dividing):
    """From pure noise only what is put back after a step tells the draft of the image."""
    for colour in ("black", "white"):
        image = Image.new("RGB", (128, 128), colour)
        call(composer, image=image, mask_image=(64, 0, 128, 128), strength=1.0, method=Draft(length=2))
    black, white = dividing.maps
    assert (black - white).abs().max() > 1e-5


def test_the_draft_does_not_depend_on_what_the_loras_do(composer, dividing):
    for weight in (1.0, 0.0):
        call(composer, [Concept(name=name, weight=weight) for name in ("cat", "dog")])
    assert torch.equal(*dividing.maps)


def test_a_draft_without_its_image_is_that_of_the_image_and_ends_with_the_drafted_steps(composer):
    whole = call(composer, record_attention=True)
    rows: list[int] = []
    hook = composer.unet.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    given = {"concepts": ["cat", "dog"], "num_inference_steps": 2, "output_type": "latent"}
    found = draft_only(composer, Draft(length=2), prompt=PROMPT, generator=seeded(), **given)
    hook.remove()
    assert rows == [2, 1], "a guided step, and the maps of the second"
    found = draft_only(composer, Draft(), prompt=PROMPT, generator=seeded(), **given)
    assert torch.equal(found.maps, whole.draft_maps)
    assert torch.equal(found.masks, whole.masks[0])
    assert torch.equal(call(composer).images, whole.images), "nothing is left of it"


@pytest.mark.parametrize(
    ("prompt", "concepts", "message"),
    [
        ([PROMPT], ["cat", "dog"], "one prompt"),
        ("a sks cat", ["cat"], "one subject alone is not drafted"),
        (PROMPT, {"cat": [0, 0, 64, 128], "dog": [64, 0, 128, 128]}, "every subject has a region"),
    ],
)
def test_what_cannot_be_drafted_alone_is_refused(composer, prompt, concepts, message):
    with pytest.raises(ValueError, match=message):
        draft_only(composer, Draft(), prompt=prompt, concepts=concepts, num_inference_steps=2)
