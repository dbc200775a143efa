"""What ComfyUI calls, on a stand-in of its protocol: LoRAs act in a sampling, and are gone afterwards."""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from comfy_stand_in import CPU, GRID, CallbacksMP, Model, ModelPatcher, patcher, sampled, standing_in, text
from lora_compose.attention import Installation, Lora, LoraFactors, NormRegions
from lora_compose.compose.comfyui.composition import ComposedConcepts, DraftSteps
from lora_compose.pipelines.scene.scene import Concept
from lora_compose.pipelines.scene.strength import Weight, WeightSchedule

STEPS = 5


@pytest.fixture(scope="module")
def hooks() -> Iterator[ModuleType]:
    with standing_in() as ours:
        yield ours("hooks")


@pytest.fixture
def model() -> ModelPatcher:
    return patcher()


def lora(model: ModelPatcher, seed: int) -> Lora:
    """Factors of every layer."""
    torch.manual_seed(seed)
    found = {}
    for name, layer in model.model.diffusion_model.named_modules():
        weight = getattr(layer, "weight", None)
        if weight is not None and weight.dim() > 1:
            ones = [1] * (weight.dim() - 2)
            down, up = torch.randn(2, *weight.shape[1:]) * 0.1, torch.randn(len(weight), 2, *ones)
            found[name] = LoraFactors(down, up)
    return found


def merging(model: ModelPatcher, *weights: Weight) -> ComposedConcepts:
    """LoRAs that act everywhere, also where other conditionings are predicted."""
    loras, everywhere = [lora(model, seed) for seed in range(len(weights))], [None] * len(weights)
    words = torch.ones(1, len(weights))
    return ComposedConcepts(loras, [WeightSchedule.of(weight) for weight in weights], everywhere, words, True, True)


def in_regions(model: ModelPatcher, **options: Any) -> ComposedConcepts:
    """Two LoRAs in the halves of an image."""
    left = torch.zeros(GRID)
    left[:, :6] = 1
    loras, weights = [lora(model, 0), lora(model, 1)], [WeightSchedule.of(1.0)] * 2
    return ComposedConcepts(loras, weights, [left, 1 - left], torch.ones(1, 2), **options)


def drafting(model: ModelPatcher) -> ComposedConcepts:
    words = torch.zeros(6, 2)
    words[1, 0] = words[4, 1] = 1
    subjects = {0: Concept(name="a", class_word="cat"), 1: Concept(name="b", class_word="dog")}
    draft = DraftSteps(text(6), words, subjects, strips=False)
    return replace(in_regions(model), regions=[None, None], draft=draft, phrases=words)


def dense(model: ModelPatcher, plan: ComposedConcepts, weights: Sequence[float]) -> ModelPatcher:
    """The model with the LoRAs in its weights."""
    changed = deepcopy(model.model)
    for one, weight in zip(plan.loras, weights, strict=True):
        for name, found in one.items():
            changed.diffusion_model.get_submodule(name).weight += weight * found.delta()
    return ModelPatcher(changed, CPU, CPU)


def left(model: ModelPatcher) -> int:
    """Modules whose `forward` is not that of their class."""
    return sum("forward" in vars(module) for module in model.model.modules())


def watching(model: ModelPatcher, look: Any) -> ModelPatcher:
    """A clone that looks before each pass, inside of what concepts do."""

    def watch(run: Any, *arguments: Any) -> Tensor:
        look(*arguments)
        return run(*arguments)

    clone = model.clone()
    clone.add_wrapper_with_key("apply_model", "watch", watch)
    return clone


def test_loras_act_as_in_the_weights_and_are_gone_afterwards(hooks: ModuleType, model: ModelPatcher) -> None:
    plan, keys, seen = merging(model, 1.0, 0.5), list(model.model.state_dict()), []
    base = sampled(model, text(1), text(2))
    wanted = sampled(dense(model, plan, [1, 0.5]), text(1), text(2))
    ours = watching(hooks.compose(model, plan), lambda *_: seen.append((left(model), [*model.model.state_dict()])))
    found = sampled(ours, hooks.marked(text(1), plan), text(2))
    assert (wanted - base).abs().max() > 0.1
    assert torch.allclose(found, wanted, atol=1e-5)
    assert all(swapped > 20 and names == keys for swapped, names in seen)
    assert len(seen) == STEPS
    assert left(model) == 0
    assert torch.equal(sampled(model, text(1), text(2)), base)
    assert torch.equal(sampled(ours, hooks.marked(text(1), plan), text(2)), found)


def test_weights_that_change_over_the_steps(hooks: ModuleType, model: ModelPatcher) -> None:
    """Against Euler's method with other weights in the model in each step."""
    plan = merging(model, "1..0.2", 0.5)
    by_step = [dense(model, plan, [1 - 0.2 * step, 0.5]).model for step in range(STEPS)]

    class Changing(Model):
        def apply_model(
            self, x: Tensor, t: Tensor, concat: Any, text: Tensor, control: Any, options: Mapping[str, Any]
        ) -> Tensor:
            return by_step[round(STEPS * (1 - float(t[0])))].apply_model(x, t, concat, text, control, options)

    wanted = sampled(ModelPatcher(Changing(), CPU, CPU), text(1), text(2))
    found = sampled(hooks.compose(model, plan), hooks.marked(text(1), plan), text(2))
    assert torch.allclose(found, wanted, atol=1e-5)
    constant = sampled(dense(model, plan, [1, 0.5]), text(1), text(2))
    assert (found - constant).abs().max() > 0.01


def test_inputs_are_made_once_and_norms_are_by_region_in_the_first_steps(
    hooks: ModuleType, model: ModelPatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 2 of 5 steps, in each of 6 layers."""
    made, normed, make, normalise = [], [], Installation.inputs, NormRegions.normalised

    def counted(self: Installation, *arguments: Any, **options: Any) -> Any:
        made.append(options["norm_regions"] is not None)
        return make(self, *arguments, **options)

    def by_region(self: NormRegions, *arguments: Any) -> Tensor:
        normed.append(len(levels))
        return normalise(self, *arguments)

    monkeypatch.setattr(Installation, "inputs", counted)
    monkeypatch.setattr(NormRegions, "normalised", by_region)
    plan, levels = in_regions(model), []
    ours = watching(hooks.compose(model, plan), lambda x, t, *_: levels.append(float(t[0])))
    sampled(ours, hooks.marked(text(1), plan), text(2))
    assert normed == [1] * 6 + [2] * 6
    assert made == [True, False]


def test_in_the_middle_of_a_sampling_comfyui_may_take_them_out(hooks: ModuleType, model: ModelPatcher) -> None:
    plan, out, passes = in_regions(model), [], []
    ours = hooks.compose(model, plan)
    mine = hooks.marked(text(1), plan)
    wanted = sampled(ours, mine, text(2))

    def change(run: Any, *arguments: Any) -> Tensor:
        ours.call(CallbacksMP.ON_EJECT_MODEL)
        out.append(left(model))
        ours.call(CallbacksMP.ON_INJECT_MODEL)
        passes.append(left(model))
        return run(*arguments)

    clone = ours.clone()
    clone.wrappers.insert(0, ("apply_model", change))  # around what concepts do
    assert torch.equal(sampled(clone, mine, text(2)), wanted)
    assert {*out} == {0}
    assert min(passes) > 20
    assert left(model) == 0
    ours.call(CallbacksMP.ON_INJECT_MODEL)
    assert left(model) == 0, "outside of a sampling nothing is put in"


def test_an_exception_leaves_nothing_behind(hooks: ModuleType, model: ModelPatcher) -> None:
    plan = in_regions(model)
    ours, mine, passes = hooks.compose(model, plan), hooks.marked(text(1), plan), []
    base, good = sampled(model, text(1), text(2)), sampled(ours, mine, text(2))

    def fail(*_: Any) -> None:
        passes.append(left(model))
        if len(passes) == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        sampled(watching(ours, fail), mine, text(2))
    assert min(passes) > 20
    assert left(model) == 0
    assert torch.equal(sampled(model, text(1), text(2)), base)
    assert torch.equal(sampled(ours, mine, text(2)), good)


def test_a_draft_begins_with_the_noise_of_the_image(hooks: ModuleType, model: ModelPatcher) -> None:
    """One of 5 steps is drafted, with the draft's text and without the LoRAs of subjects."""
    plan, seen = drafting(model), []
    ours = watching(hooks.compose(model, plan), lambda x, t, concat, read, *_: seen.append((x, float(t[0]), read)))
    found = sampled(ours, hooks.marked(text(1), plan), text(2), batch=2)
    assert [level for _, level, _ in seen] == pytest.approx([1, 1, 0.8, 0.6, 0.4, 0.2])
    assert torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][2][0], text(6)[0][0][0])
    assert torch.equal(seen[1][2][0], text(1)[0][0][0])
    seen.clear()
    alone = hooks.draft_alone(ours, lambda: sampled(ours, hooks.marked(text(1), plan), text(2), batch=2))
    assert len(seen) == 1
    assert alone.maps.shape == alone.cells.shape == (2, 2, *GRID)
    assert torch.equal(alone.cells.sum(dim=1), torch.ones(2, *GRID)), "each cell is of one subject"
    images = [[*image] for image in alone.cells]
    given = replace(plan, draft=None, regions=images[0])
    one = sampled(hooks.compose(model, given), hooks.marked(text(1), given), text(2), batch=2)
    assert torch.allclose(found[:1], one[:1], atol=1e-5), "as with these regions given, which have the bias, too"
    with pytest.raises(ValueError, match="nothing is drafted with this model"):
        hooks.draft_alone(hooks.compose(model, given), lambda: None)
    with pytest.raises(ValueError, match="there are no steps to draft"):
        hooks.draft_alone(ours, lambda: None)


def test_texts_of_regions_are_read_one_after_the_other(hooks: ModuleType, model: ModelPatcher) -> None:
    """The conditioning is longer in passes, and what the guider has is as before afterwards."""
    words, seen = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), []
    plan = in_regions(model, texts=[text(n, 4) for n in range(3)], owners=(0, 1))
    plan = replace(plan, words=words)
    ours = watching(hooks.compose(model, plan), lambda x, t, concat, read, *_: seen.append(read))
    found = sampled(ours, hooks.marked(text(1), plan), text(2))
    assert {read.shape[1] for read in seen} == {12}
    assert torch.equal(seen[0][0], torch.cat([text(n, 4)[0][0][0] for n in range(3)]))
    assert torch.equal(seen[0][1], text(2)[0][0][0].repeat(2, 1)), "of others, repeated as ComfyUI does it"
    same = replace(plan, texts=[text(0, 4)] * 3)
    other = sampled(hooks.compose(model, same), hooks.marked(text(1), same), text(2))
    assert (found - other)[..., :6].abs().max() > 0.01


def test_another_override_of_attention_is_called_by_ours(hooks: ModuleType, model: ModelPatcher) -> None:
    """Save in the 2 cross-attentions with a bias, which this one drops as SageAttention does."""
    plan, calls = drafting(model), []

    def override(core: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Any, **options: Any) -> Tensor:
        calls.append(q.shape)
        return core(q, k, v, heads, **options)

    ours, mine = hooks.compose(model, plan), hooks.marked(text(1), plan)
    wanted = sampled(ours, mine, text(2))
    found = sampled(ours, mine, text(2), optimized_attention_override=override)
    assert len(calls) == 4 * (1 + STEPS) - 2 * STEPS
    assert torch.equal(found, wanted)
    unbiased = replace(plan, phrases=None)
    without = sampled(hooks.compose(model, unbiased), hooks.marked(text(1), unbiased), text(2))
    assert (without - wanted).abs().max() > 0.001


def area(mine: list[list[Any]]) -> list[list[Any]]:
    return [[words, {**options, "area": (4, 6, 0, 0)}] for words, options in mine]


MISTAKES = {
    "no mark": "connect the CONDITIONING of the same Compose to the sampler",
    "another Compose": "conditionings of several Compose nodes cannot be sampled together",
    "another text": "the conditioning has 12 tokens, the text of the concepts has 6",
    "a changed text": "another node has changed the conditioning of Compose, where regions read texts of their own",
    "another pooled text": "another node has changed the conditioning of Compose",
    "attention replaced": "another node replaces attention",
    "attention masked": "another node masks attention",
    "fewer cells": "another node changes the cells that attention sees",
    "tiles": r"another node changes the cells that layers see, .* take it out, or use merge or tara",
    "a smaller grid": r"another node changes the cells that layers see, .* take it out, or use merge or tara",
    "a smaller grid later": r"another node changes the cells that layers see, .* take it out, or use merge or tara",
    "a batch": "set batch_size to 1",
    "unused": "the conditioning of Compose is not used in the first steps",
    "another copy": "concepts act in one copy of a model alone",
    "references": "reference images cannot be combined with concepts yet",
    "an area": "a conditioning with an area of its own cannot be combined with regions",
}


CELLS: dict[str, dict[str, Any]] = {
    "tiles": {"tiles": 4}, "a smaller grid": {"halved_below": 2}, "a smaller grid later": {"halved_below": 0.5}
}  # fmt: skip


@pytest.mark.parametrize("options", CELLS.values(), ids=CELLS)
def test_where_concepts_act_everywhere_another_node_may_change_the_cells(
    hooks: ModuleType, model: ModelPatcher, options: dict[str, Any]
) -> None:
    plan = merging(model, 1.0, 0.5)
    wanted = sampled(dense(model, plan, [1, 0.5]), text(1), text(2), **options)
    found = sampled(hooks.compose(model, plan), hooks.marked(text(1), plan), text(2), **options)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert (wanted - sampled(dense(model, plan, [1, 0.5]), text(1), text(2))).abs().max() > 0.01


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_cannot_be_done_is_said(hooks: ModuleType, model: ModelPatcher, mistake: str) -> None:
    plan, other = replace(drafting(model), tokens=6), in_regions(model)
    ours, mine, batch = hooks.compose(model, plan), hooks.marked(text(1), plan), 1
    options: dict[str, Any] = {}
    if mistake == "no mark":
        mine = text(1)
    elif mistake == "another Compose":
        mine += hooks.marked(text(3), other)
    elif mistake == "another text":
        mine = hooks.marked(text(1, 12), plan)
    elif mistake in ("a changed text", "another pooled text"):
        plan = replace(in_regions(model), texts=[text(n) for n in range(3)], owners=(0, 1), whole=text(1))
        plan = replace(plan, words=torch.ones(3, 2))
        ours, mine = hooks.compose(model, plan), hooks.marked(text(1), plan)
        sampled(ours, mine, text(2))
        ((words, more),) = mine
        pooled = {"pooled_output": torch.ones(1, 4)}
        mine = [[words * 0.5, more]] if mistake == "a changed text" else [[words, {**more, **pooled}]]
    elif mistake == "attention replaced":
        options = {"patches_replace": {"attn2": {}}}
    elif mistake == "attention masked":
        options = {"mask": torch.zeros(1)}
    elif mistake == "fewer cells":
        options = {"every": 2}
    elif mistake in CELLS:
        ours, mine, options = hooks.compose(model, other), hooks.marked(text(1), other), CELLS[mistake]
    elif mistake == "a batch":
        plan = replace(plan, texts=[text(n) for n in range(3)], owners=(0, 1), tokens=None)
        ours, mine, batch = hooks.compose(model, plan), hooks.marked(text(1), plan), 2
    if mistake in ("unused", "another copy", "references", "an area"):
        wrapper = {"unused": unused, "another copy": on_another_copy, "references": with_references, "an area": cut}
        ours.wrappers.insert(1, ("apply_model", wrapper[mistake]))  # around what concepts do
    with pytest.raises(ValueError, match=MISTAKES[mistake]):
        sampled(ours, mine, text(2), batch=batch, **options)
    assert left(model) == 0
    with pytest.raises(ValueError, match="this model has concepts already"):
        hooks.compose(ours, other)


def unused(run: Any, *arguments: Any) -> Tensor:
    *before, options = arguments
    return run(*before, {**options, "uuids": ["other"] * len(options["uuids"])})


def on_another_copy(run: Any, *arguments: Any) -> Tensor:
    run.class_obj = object()
    return run(*arguments)


def with_references(run: Any, *arguments: Any) -> Tensor:
    return run(*arguments, ref_latents=[torch.zeros(1)])


def cut(run: Any, x: Tensor, *arguments: Any) -> Tensor:
    return run(x[..., :4], *arguments)
