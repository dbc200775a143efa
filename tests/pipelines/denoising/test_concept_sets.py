"""Different concepts for the prompts of one call: the same images as one call for each."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from comparisons import assert_close
from components import (
    EVERYTHING,
    FAMILIES,
    TINY,
    State,
    random_lora,
    save_lora,
    sd_unet,
    seeded,
    small_pipeline,
    text_loras,
    with_library,
)
from composing import BOTH
from lora_compose.pipelines.methods import Clora, Composite, LoraComposer, Settings, Switch, Tara
from lora_compose.pipelines.scene.scene import Concept

WORDS = {"cat": "sks", "dog": "zwx", "bear": "xlo"}
PROMPTS = ["a sks cat and a zwx dog", "in snow, a xlo bear", "a tree"]
LEFT, RIGHT = (0, 0, 64, 128), (64, 0, 128, 128)
SETS_WITH_REGION = [Concept(name="cat", region=(0, 0, 64, 128)), "dog"]
SETS: list[list[str | Concept]] = [["cat", Concept(name="dog", weight=0.6)], ["bear"], []]
SETTINGS = (Tara(cfg_mask="broadcast"), Tara(scope="cross_kv"))
METHODS = ("merge", "tara", *SETTINGS, Switch(interval=1), "composite")
USUAL = ("tara", "composite")


@pytest.fixture(scope="module")
def library_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """By family, the concepts "cat", "dog" and "bear"."""

    @cache
    def library(family: str) -> Any:
        pipe, folder = FAMILIES[family](), tmp_path_factory.mktemp(family)
        for seed, (name, trigger) in enumerate(WORDS.items()):
            parts = {"unet": random_lora(pipe.unet, seed, targets=EVERYTHING, size=0.15), **text_loras(pipe, 5 + seed)}
            file = save_lora(folder / f"{name}.safetensors", **parts)
            pipe.load_concept(file, name, trigger=trigger, class_word=name)
        return pipe.library

    return library


@pytest.fixture
def pipe(family: str, library_of) -> Any:
    """A tiny pipeline with the concepts "cat", "dog" and "bear"."""
    return with_library(FAMILIES[family](), library_of(family))


def latents_of(pipe: Any, prompt: Any, concepts: Any, method: Any, **arguments: Any) -> Tensor:
    given = {"num_inference_steps": 2, "output_type": "latent", "guidance_scale": 4.0}
    return pipe(prompt, concepts=concepts, method=method, **given | arguments).images


def assert_as_one_by_one(
    pipe: Any, sets: Any, method: Any, prompts: list[str] = PROMPTS, images: int = 1, **arguments: Any
) -> Tensor:
    """Compares the images of all prompts with those of one call for each, and returns them."""
    seeds = [range(images * k, images * (k + 1)) for k in range(len(prompts))]
    arguments |= {"num_images_per_prompt": images}
    generators = [seeded(seed) for mine in seeds for seed in mine]
    together = latents_of(pipe, prompts, sets, method, generator=generators, **arguments)
    alone = [
        latents_of(pipe, prompt, own, method if own else None, generator=[seeded(seed) for seed in mine], **arguments)
        for prompt, own, mine in zip(prompts, sets, seeds, strict=True)
    ]
    assert_close(together, torch.cat(alone))
    return together


@pytest.mark.parametrize(
    ("family", "method"),
    [
        *(pytest.param("sd", method, marks=() if method in USUAL else pytest.mark.slow) for method in METHODS),
        *(pytest.param("sdxl", method, marks=pytest.mark.slow) for method in ("merge", "composite")),
    ],
    ids=str,
)
def test_every_prompt_has_the_image_of_its_own_call(pipe, family, method):
    before = State(pipe)
    images = 2 if (family, method) == ("sd", "merge") else 1
    assert_as_one_by_one(pipe, SETS, method, images=images)
    before.assert_unchanged()


@pytest.mark.parametrize("method", ["composite", pytest.param("merge", marks=pytest.mark.slow)])
def test_without_guidance_as_well(pipe, method):
    assert_as_one_by_one(pipe, SETS, method, guidance_scale=1.0)


def test_it_costs_no_more_rows_than_the_largest_concept_set(pipe):
    for method, rows in (("merge", 2 * 3), ("tara", 2 * 3), ("switch", 2 * 3), ("composite", 2 * 2 * 3)):
        sets, prompts = [["cat", "dog"], ["bear"], ["cat"]], [*PROMPTS[:2], "a sks cat"]
        cost = pipe(prompts, concepts=sets, method=method, num_inference_steps=1, output_type="latent").cost
        assert cost.rows_forward == rows


def test_the_same_concept_may_have_another_region_in_every_image(pipe):
    prompts = ["a sks cat and a zwx dog", "a zwx dog and a sks cat"]
    sets = [
        [Concept(name="cat", region=LEFT), Concept(name="dog", region=RIGHT)],
        [Concept(name="cat", region=RIGHT, weight=0.7), "dog"],
    ]
    assert_as_one_by_one(pipe, sets, "regional", prompts)
    assert_as_one_by_one(pipe, sets, "merge", prompts)


def test_the_same_concept_may_have_other_factors_on_blocks_in_every_image(pipe):
    sets = [[Concept(name="cat", blocks={"down": 0.5, "text": 0.0}), "dog"], [Concept(name="cat", blocks={"up": 0.2})]]
    assert_as_one_by_one(pipe, sets, "merge", ["a sks cat and a zwx dog", "a sks cat"])


@pytest.mark.parametrize("first", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_regions_in_one_prompt_leave_one_without_concepts_alone(pipe, first):
    order = slice(None) if first else slice(None, None, -1)
    assert_as_one_by_one(pipe, [SETS_WITH_REGION, []][order], "regional", [PROMPTS[0], PROMPTS[2]][order])


def test_token_positions_of_concepts_that_no_prompt_has_are_refused(pipe):
    embeds = pipe.encode_prompt(PROMPTS[:2], device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    given = {"prompt_embeds": embeds[0], "token_positions": {"cta": [2]}, "guidance_scale": 1.0}
    if len(embeds) > 2:
        given["pooled_prompt_embeds"] = embeds[2]
    with pytest.raises(ValueError, match=r"token_positions names \['cta'\]"):
        latents_of(pipe, None, [["cat", "dog"], ["bear"]], "tara", **given)


def test_composite_may_have_shares_where_all_sets_have_as_many_subjects(pipe):
    prompts = ["a sks cat and a zwx dog", "a xlo bear and a sks cat"]
    assert_as_one_by_one(pipe, [["cat", "dog"], ["bear", "cat"]], Composite(shares=[1, 3]), prompts)


@pytest.mark.parametrize("method", [Switch(interval=1), pytest.param("composite", marks=pytest.mark.slow)], ids=str)
def test_negative_prompts_of_concepts_are_read_in_their_own_sets(pipe, method):
    sets = [[Concept(name="cat", negative_prompt="grass"), "dog"], [Concept(name="bear", negative_prompt="night")], []]
    found = assert_as_one_by_one(pipe, sets, method)
    plain = latents_of(pipe, PROMPTS, [["cat", "dog"], ["bear"], []], method, generator=[seeded(k) for k in range(3)])
    assert ((found - plain).abs().amax(dim=(1, 2, 3)) > 1e-2).tolist() == [True, True, False]


def test_the_same_name_may_have_another_trigger(pipe):
    prompts = ["a sks cat", "a mjq cat"]
    assert_as_one_by_one(pipe, [["cat"], [Concept(name="cat", trigger="mjq")]], "tara", prompts)


def test_maps_and_masks_are_empty_for_concepts_that_are_not_in_the_set(pipe):
    output = pipe(
        PROMPTS, concepts=SETS, method="tara", num_inference_steps=1, output_type="latent", record_attention=True
    )
    seen = output.attention_maps[0].amax(dim=(-2, -1)) > 0
    assert seen.tolist() == [[True, True, False], [False, False, True], [False, False, False]]
    assert torch.equal(output.masks[0].any(dim=-1).any(dim=-1), seen)


@BOTH
def test_token_positions_may_differ_by_prompt(pipe):
    sets: Any = [["cat", "dog"], ["bear"]]
    expected = latents_of(pipe, PROMPTS[:2], sets, "tara", generator=[seeded(0), seeded(1)])
    names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    encoded = dict(zip(names, pipe.encode_prompt(PROMPTS[:2], device="cpu", num_images_per_prompt=1,
                                                 do_classifier_free_guidance=True), strict=False))  # fmt: skip
    positions = {"cat": [2], "dog": [[6], []], "bear": [5]}
    found = latents_of(
        pipe, None, sets, "tara", generator=[seeded(0), seeded(1)], token_positions=positions, **encoded
    )  # fmt: skip
    assert torch.equal(found, expected)


def test_a_callback_may_switch_guidance_off(pipe):
    def cut(pipe, step, timestep, tensors):
        pipe._guidance_scale = 1.0
        return {}

    for method in ("composite", "merge"):
        assert_as_one_by_one(pipe, SETS[:2], method, PROMPTS[:2], callback_on_step_end=cut, num_inference_steps=2)


def test_a_method_is_chosen_for_all_prompts(pipe):
    def assert_chosen(method: str, prompts: list[str], sets: Any, reason: str = "") -> None:
        plan = pipe.plan(prompts, concepts=sets)
        assert plan.method == method
        assert reason in plan.choice.reason

    named = ["a sks cat and a zwx dog", "a xlo bear", "a mjq fox and a sks cat"]
    sets = [["cat", "dog"], ["bear"]]
    drafted, chosen = (latents_of(pipe, named[:2], sets, method, generator=seeded()) for method in ("draft", None))
    assert torch.equal(chosen, drafted)
    without = "the prompt has 'zwx' without 'dog' after it: write 'zwx dog'"
    assert_chosen("merge", ["a sks cat and a zwx", named[1]], [["cat", "dog"], ["bear"]], without)
    assert_chosen("merge", [named[0], named[1]], [["cat"], ["bear"]], "no prompt has several subjects")
    boxed = [[Concept(name="cat", region=LEFT)], [Concept(name="bear", region=RIGHT)]]
    assert_chosen("regional", named[:2], boxed)
    boxed[0].append(Concept(name="dog", region=RIGHT))
    assert_chosen("draft", named[:2], boxed)


def test_the_same_list_for_every_prompt_is_one_list(pipe):
    names: Any = ["cat", "dog"]
    prompts = [PROMPTS[0], "a zwx dog and a sks cat"]
    listed = latents_of(pipe, prompts, [names, names], "merge", generator=seeded())
    assert torch.equal(listed, latents_of(pipe, prompts, names, "merge", generator=seeded()))


BOXED: list[list[str | Concept]] = [
    [Concept(name="cat", region=LEFT), Concept(name="dog", region=RIGHT, weight=0.6)],
    [Concept(name="bear", region=(32, 32, 96, 112), prompt="a xlo bear, sitting")],
    [],
    [Concept(name="cat", region=RIGHT), "bear"],
    ["cat", Concept(name="dog", negative_prompt="grass")],
]
DIVIDED: dict[str, tuple[str | Settings, Sequence[int]]] = {
    "clora": ("clora", (0, 1, 2)),
    "clora, branches": (Clora(fuse="branches", uncond="each", exclusive=False), (1, 4)),
    "lora-composer": (LoraComposer(most_updates=0.25), (1, 2, 3)),
    "lora-composer, official": (LoraComposer.official(), (3, 0)),
}
SLOW = ("clora", "lora-composer, official")
"""What branches, and our defaults, show as well."""
FIVE = [*PROMPTS, "a xlo bear, and a sks cat", "a sks cat near a zwx dog"]
STEPS = 2
"""So many that updates end before the last one."""


@pytest.mark.parametrize(
    ("family", "case"),
    [
        *(pytest.param("sd", case, marks=pytest.mark.slow if case in SLOW else ()) for case in DIVIDED),
        *(pytest.param("sdxl", case, marks=pytest.mark.slow) for case in ("clora", "lora-composer")),
    ],
)
def test_methods_that_divide_the_canvas_make_the_images_of_one_call_for_each(pipe, case):
    method, chosen = DIVIDED[case]
    prompts, sets = [FIVE[i] for i in chosen], [BOXED[i] for i in chosen]
    before = State(pipe)
    images = 2 if case == "clora, branches" else 1
    assert_as_one_by_one(pipe, sets, method, prompts, images=images, num_inference_steps=STEPS)
    before.assert_unchanged()


def test_words_that_name_a_concept_are_for_the_prompts_that_have_it(pipe):
    chosen = (0, 3)
    prompts, sets = [FIVE[i] for i in chosen], [BOXED[i] for i in chosen]
    words = [{"cat": ["sks", "cat"]}, {"cat": ["sks", "cat"], "bear": ["bear"]}]
    given: dict[str, Any] = {"num_inference_steps": STEPS}
    together = latents_of(pipe, prompts, sets, Clora(mask_words=words[1]), generator=[seeded(0), seeded(1)], **given)
    for row in range(2):
        method = Clora(mask_words=words[row])
        alone = latents_of(pipe, prompts[row], sets[row], method, generator=seeded(row), **given)
        assert_close(together[row], alone[0])


def test_a_model_that_takes_the_guidance_scale_as_an_input_gets_it_for_every_concept_set(write_lora):
    pipe = small_pipeline(unet=sd_unet(**TINY, time_cond_proj_dim=8))
    for seed, (name, trigger) in enumerate(WORDS.items()):
        lora = write_lora(name, unet=random_lora(pipe.unet, seed, targets=EVERYTHING, size=0.15))
        pipe.load_concept(lora, name, trigger=trigger, class_word=name)
    assert_as_one_by_one(pipe, BOXED[:2], "lora-composer", FIVE[:2], num_inference_steps=1)


@pytest.mark.parametrize("method", ["clora", pytest.param("lora-composer", marks=pytest.mark.slow)])
def test_prompts_of_the_same_concept_set_go_through_the_model_together(pipe, method):
    calls, prompts = [], [FIVE[i] for i in (0, 1, 0)]
    sets = [BOXED[i] for i in (0, 1, 0)]
    hook = pipe.unet.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    together = pipe(prompts, concepts=sets, method=method, num_inference_steps=1, output_type="latent")
    made, alone = len(calls), []
    for one, mine in zip(prompts[:2], sets[:2], strict=True):
        alone.append(pipe(one, concepts=mine, method=method, num_inference_steps=1, output_type="latent").cost)
    hook.remove()
    rows = 2 * alone[0].rows_forward + alone[1].rows_forward
    assert together.cost.rows_forward == pytest.approx(rows)
    # CLoRA has a pass of its own for the regions of each image.
    assert made == len(calls) - made + (method == "clora")


@pytest.mark.parametrize("method", ["clora", pytest.param("lora-composer", marks=pytest.mark.slow)])
def test_maps_and_masks_of_divided_canvases_are_those_of_one_call_for_each(pipe, method):
    chosen = (0, 1, 2)
    prompts, sets = [FIVE[i] for i in chosen], [BOXED[i] for i in chosen]
    given: Any = {"num_inference_steps": 1, "output_type": "latent", "record_attention": True}
    together = pipe(
        prompts, concepts=sets, method=method, generator=[seeded(k) for k in range(len(prompts))], **given
    )  # fmt: skip
    columns = {0: [0, 1], 1: [2], 2: []}
    for row in range(2):
        alone = pipe(prompts[row], concepts=sets[row], method=method, generator=seeded(row), **given)
        mine = together.attention_maps[:, row]
        torch.testing.assert_close(mine[:, columns[row]], alone.attention_maps[:, 0], atol=1e-4, rtol=1e-3)
        assert (together.masks[:, row, columns[row]] == alone.masks[:, 0]).float().mean() > 0.99
    for row, own in columns.items():
        others = [column for column in range(3) if column not in own]
        assert not together.attention_maps[:, row, others].any()
        assert not together.masks[:, row, others].any()


@pytest.mark.parametrize(("family", "method"), [
    ("sd", "clora"), *(pytest.param(family, "lora-composer", marks=pytest.mark.slow) for family in FAMILIES),
])  # fmt: skip
def test_callbacks_see_all_prompts_of_divided_canvases(pipe, method):
    shapes = []

    def look(pipe, step, timestep, tensors):
        pipe._guidance_scale = 1.0
        shapes.append({name: tuple(tensor.shape[:1]) for name, tensor in tensors.items()})
        return {}

    given: Any = {"callback_on_step_end": look, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    given["num_inference_steps"] = STEPS
    assert_as_one_by_one(pipe, BOXED[:2], method, PROMPTS[:2], **given)
    assert shapes[:STEPS] == [{"latents": (2,), "prompt_embeds": (4,)}] * STEPS


def test_only_empty_lists_are_a_plain_call(pipe):
    plain = latents_of(pipe, PROMPTS[:2], None, None, generator=seeded())
    assert torch.equal(latents_of(pipe, PROMPTS[:2], [[], []], None, generator=seeded()), plain)


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "too few": ([["cat"]], "merge", "there are concepts for 1 prompts, but 2 prompts"),
    "mixture": ([["cat"], "bear"], "merge", "a list for each prompt, but not a mixture of both"),
    "twice": ([["cat", "cat"], ["bear"]], "merge", "'cat' stands twice"),
    "unknown": ([["cat"], ["fox"]], "merge", "unknown concept 'fox'"),
    "word missing": ([["cat"], ["dog"]], "tara", "the trigger 'zwx' of concept 'dog' is not in the prompt 'in snow"),
    "no region": ([[Concept(name="cat", region=LEFT), "dog"], ["bear"]], "lora-composer",
                  "lora-composer needs to know where the concepts are"),
    "words of no concept": ([["cat", "dog"], ["bear"]], Clora(words={"fox": ["fox"]}),
                            "words names .'fox'.; the subjects are cat, dog, bear"),
    "shares": ([["cat", "dog"], ["bear"]], Composite(shares=[1, 2]),
               "composite has 2 shares, but there are 1 concepts"),
    "regional": ([[Concept(name="cat", region=LEFT)], ["bear"]], "regional",
                 "regional needs to know where the concepts are"),
}  # fmt: skip


def test_what_does_not_fit_is_refused_and_nothing_is_changed(pipe):
    before = State(pipe)
    for sets, method, message in REFUSED.values():
        with pytest.raises(ValueError, match=message):
            latents_of(pipe, PROMPTS[:2], sets, method)
    before.assert_unchanged()
