"""Weights that change over the steps and factors by block, against diffusers' own adapters and files scaled by hand."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from components import EVERYTHING, FAMILIES, lora_tensors, random_lora, seeded, text_loras
from composing import BOXED, PLAIN, TRIGGERS, assert_close, far_apart
from lora_compose.attention import Lora
from lora_compose.attention.lora_bank import BankLayer
from lora_compose.attention.text_kv import TextKV
from lora_compose.compose.check.report import check
from lora_compose.compose.commands.asked import parse_concept
from lora_compose.compose.files.images import read_record, save_image
from lora_compose.compose.files.scenes import read_scene, write_scene
from lora_compose.compose.generate.making import make
from lora_compose.compose.generate.replay import difference, remake, runnable
from lora_compose.pipelines.denoising.passes import MapLoss, MapRequest, Pass
from lora_compose.pipelines.denoising.process import constant_gates
from lora_compose.pipelines.denoising.session import Session
from lora_compose.pipelines.methods import METHODS, LoraComposer, Settings
from lora_compose.pipelines.scene.canvas import Step
from lora_compose.pipelines.scene.scene import Concept, Run, Scene
from lora_compose.pipelines.scene.strength import WeightSchedule, blocks_text, read_blocks, read_weight, weight_text
from lora_compose.pipelines.support.field_errors import FieldError
from lora_compose.pipelines.text.conditioning import Conditioning
from pairs import slow_but

PROMPT = "a sks cat and a zwx dog on grass"
BOXES = {concept.name: concept.region for concept in BOXED}
STEPS = 4

# What is written


def weights_of(text: Any, steps: int) -> list[float]:
    schedule = WeightSchedule.of(read_weight(text))
    return [round(schedule.at(step, steps), 6) for step in range(steps)]


@pytest.mark.parametrize(
    ("given", "steps", "weights"),
    [
        (0.8, 3, [0.8] * 3),
        ("0:1,0.5:0", 4, [1, 1, 0, 0]),
        ("0.5:1, 0.75:-.5", 4, [1, 1, 1, -0.5]),
        ("1..0.4", 4, [1, 0.8, 0.6, 0.4]),
        ("1..0.4", 1, [1]),
        ("0..1..0", 4, [0, 0.5, 1, 0]),
        ("0:1..0.5:0.4", 4, [1, 0.7, 0.4, 0.4]),
        ("0.5:1..1:0.5", 5, [1, 1, 1, 0.833333, 0.5]),
        ("0:0..0.2:1,0.8:0", 10, [0, 0.5, 1, 1, 1, 1, 1, 1, 0, 0]),
        ("0:1,3:0", 5, [1, 1, 1, 0, 0]),
        ("0:0..4:1", 3, [0, 0.25, 0.5]),
        ("0:1,0.28:0", 25, [1] * 7 + [0] * 18),
        ("1,0.5,0", 3, [1, 0.5, 0]),
        ([1, 0.5, 0], 6, [1, 1, 0.5, 0.5, 0, 0]),
        ([1, 0.5, 0], 5, [1, 1, 0.5, 0.5, 0]),
        ("1e-1,2E0", 2, [0.1, 2]),
    ],
)
def test_the_weight_of_every_step(given: Any, steps: int, weights: list[float]) -> None:
    assert weights_of(given, steps) == weights


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=40))
def test_a_list_as_long_as_the_steps_has_a_number_for_each(weights: list[float]) -> None:
    schedule, steps = WeightSchedule.of(read_weight(weights)), len(weights)
    assert [schedule.at(step, steps) for step in range(steps)] == weights
    passes = 2 * steps - 1  # a scheduler with two passes a step, but for the last
    assert [schedule.at(i, passes) for i in range(passes)] == [weights[i // 2] for i in range(passes)]


numbers = st.floats(allow_nan=False, allow_infinity=False)
separators = st.sampled_from(["..", ","])


@st.composite
def schedules(draw: st.DrawFn) -> str:
    places = sorted(draw(st.sets(st.integers(0, 100), min_size=1, max_size=5)))
    points = [f"{place / 100:g}:{draw(st.floats(-9, 9)):.3f}" for place in places]
    return points[0] + "".join(draw(separators) + point for point in points[1:])


@given(schedules(), st.integers(1, 60))
def test_schedules_stay_between_their_points_and_arrive(text: str, steps: int) -> None:
    schedule = WeightSchedule.of(read_weight(text))
    every = [point.weight for point in schedule.points]
    found = [schedule.at(step, steps) for step in range(steps)]
    assert all(min(every) - 1e-9 <= weight <= max(every) + 1e-9 for weight in found)
    if steps > 1 and schedule.points[-1].at == 1:
        assert found[-1] == every[-1]
    assert math.isclose(schedule.mean(steps), sum(found) / steps)
    assert (schedule.constant is not None) == (len(set(every)) == 1)


@given(numbers | st.lists(numbers, min_size=1, max_size=6) | schedules())
def test_weights_survive_being_written(given: Any) -> None:
    weight = read_weight(given)
    assert read_weight(weight) == weight
    again = read_weight(weight_text(weight))
    assert WeightSchedule.of(again) == WeightSchedule.of(weight)


@given(st.text() | st.text(alphabet="0123456789.:,-e "))
def test_any_text_is_a_weight_or_is_refused_in_words(text: str) -> None:
    try:
        weight = read_weight(text)
    except ValueError:
        with pytest.raises(ValueError, match=r"expected|needs positions|points|point|says where"):
            read_weight(text)
        return
    assert all(math.isfinite(WeightSchedule.of(weight).at(step, 7)) for step in range(7))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("much", "expected a valid number, a list of numbers, or a schedule such as .*'much'"),
        ("inf", "expected a finite number, found inf"),
        (True, "expected a valid number"),
        ([], "expected 1 to 1000 numbers"),
        ([0.0] * 1001, "1001"),
        ([1, "x"], "expected a valid number"),
        ([1, math.inf], "expected a finite number"),
        ("1e999..0", "expected a finite number"),
        ("1...4..", "expected a valid number"),
        ("0:1,", "expected a valid number"),
        ("0:1,0.5", "give every point of a schedule a position"),
        ("1..0.5,0", "needs positions"),
        ("0.5:1,0.2:0", "one after the other"),
        ("-1:1,0.2:0", "begin at 0 or later"),
        ("0.5:1,2:0", "fractions of the steps from 0 to 1, or all at whole step numbers"),
        ("0:1,1e999:0", "fractions of the steps from 0 to 1, or all at whole step numbers"),
    ],
)
def test_weights_that_cannot_be_read_are_explained(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_weight(given)
    with pytest.raises(FieldError, match="weight"):
        Concept(name="cat", weight=given)


@given(st.dictionaries(st.sampled_from(["down", "mid", "up", "down.0", "up_blocks.1.attentions.0", "text"]), numbers))
def test_blocks_survive_being_written(blocks: dict[str, float]) -> None:
    assert read_blocks(blocks) == blocks
    assert read_blocks(blocks_text(blocks)) == blocks


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"middle": 1}, "there is no block 'middle'; expected down, mid, up, down.0"),
        ({"down": "much"}, "expected a valid number"),
        ({"down": 1, "down_blocks": 1}, "down and down_blocks are the same block"),
        ("down:1,down:0", "given twice"),
        ("down", "such as down:0.5,up.1:0"),
        ([1], "expected factors by block"),
        ({1: 1}, "there is no block '1'"),
    ],
)
def test_blocks_that_cannot_be_read_are_explained(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_blocks(given)
    with pytest.raises(FieldError, match="blocks"):
        Concept(name="cat", blocks=given)


def test_a_concept_with_a_schedule_is_the_same_on_the_command_line_and_in_a_file(tmp_path: Any) -> None:
    concept = parse_concept(
        "path=cat.safetensors,weight=0:1..0.5:0.4,0.8:0,blocks=down:0.5,up.1:0,prompt=a sks cat, asleep,negative=dark"
    )
    assert concept == Concept(
        name="cat", lora="cat.safetensors", weight="0:1..0.5:0.4,0.8:0", blocks={"down": 0.5, "up.1": 0.0},
        prompt="a sks cat, asleep", negative_prompt="dark",
    )  # fmt: skip
    assert parse_concept("path=a,weight=1,0.5,0,role=style").weight == (1.0, 0.5, 0.0)
    (tmp_path / "a.yaml").write_text(
        "prompt: sks\nconcepts:\n- {name: a, weight: [1, 0.5]}\n- {name: b, weight: 1..0.4, blocks: {down: 0.5}}\n"
        "- name: c\n  weight: 0:1,0.5:0\n"
    )
    scene = read_scene(tmp_path / "a.yaml")
    assert [found.weight for found in scene.concepts] == [(1.0, 0.5), "1..0.4", "0:1,0.5:0"]
    assert scene.concepts[1].blocks == {"down": 0.5}
    write_scene(scene, tmp_path / "b.yaml")
    assert read_scene(tmp_path / "b.yaml") == scene


# What it does


@pytest.fixture
def load(write_lora) -> Callable[..., Any]:
    """A tiny pipeline of a family with the concepts "cat" and "dog"."""

    def load(family: str, *, text: bool = False) -> Any:
        pipe = FAMILIES[family]()
        for name, path in files(pipe, write_lora, text).items():
            pipe.load_concept(path, name, trigger=TRIGGERS[name], class_word=name)
        return pipe

    return load


def files(pipe: Any, write_lora: Any, text: bool) -> dict[str, Any]:
    return {
        name: write_lora(
            name,
            unet=random_lora(pipe.unet, seed, targets=EVERYTHING, size=0.15),
            **(text_loras(pipe, 5 + seed) if text else {}),
        )
        for seed, name in enumerate(TRIGGERS)
    }


def compose(pipe: Any, method: Any, weights: Sequence[Any], steps: int = STEPS, **arguments: Any) -> Any:
    concepts = [
        Concept(name=name, weight=weight, region=BOXES[name]) for name, weight in zip(TRIGGERS, weights, strict=True)
    ]
    given = {"concepts": concepts, "num_inference_steps": steps, "output_type": "latent", "generator": seeded()}
    return pipe(PROMPT, method=method, **given | arguments)


def latents_of(pipe: Any, method: Any, weights: Sequence[Any], **arguments: Any) -> Tensor:
    return compose(pipe, method, weights, **arguments).images


# The families differ in nothing here but the text: methods with a text for all, and one with updates.
IN_FAMILIES = [
    ("sd", "merge"),
    pytest.param("sd", "switch", marks=pytest.mark.slow),
    ("sd", "clora"),
    pytest.param("sdxl", "clora", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("family", "method"), IN_FAMILIES)
def test_a_schedule_that_never_changes_is_the_number_bit_for_bit(load, family, method):
    pipe = load(family)
    number = latents_of(pipe, method, [0.7, 1.0], steps=2)
    assert torch.equal(latents_of(pipe, method, ["0:0.7..0.5:0.7", [1.0, 1.0]], steps=2), number)


@torch.no_grad()
def by_hand(pipe: Any, weights: Callable[[int], Sequence[float]]) -> Tensor:
    """A plain loop of diffusers' own parts, in which the adapters' weights are set in every step."""
    pipe.set_adapters(list(TRIGGERS), [0.0, 0.0])
    cond, uncond, *pooled = pipe.encode_prompt(PROMPT, device="cpu", num_images_per_prompt=1,
                                               do_classifier_free_guidance=True)  # fmt: skip
    added = None
    if pooled:
        sizes = torch.tensor([[128.0, 128, 0, 0, 128, 128]] * 2)
        added = {"text_embeds": torch.cat(pooled[::-1]), "time_ids": sizes}
    pipe.scheduler.set_timesteps(STEPS)
    latents = torch.randn(1, 4, 16, 16, generator=seeded()) * pipe.scheduler.init_noise_sigma
    for step, t in enumerate(pipe.scheduler.timesteps):
        pipe.set_adapters(list(TRIGGERS), list(weights(step)))
        out = pipe.unet(torch.cat([latents] * 2), t, torch.cat([uncond, cond]), added_cond_kwargs=added).sample
        without, given = out.chunk(2)
        scale = 5.0 if pooled else 7.5  # the defaults of both pipelines
        latents = pipe.scheduler.step(without + scale * (given - without), t, latents).prev_sample
    return latents


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """diffusers' own pipeline of a family with the same LoRAs as adapters, which tests only switch."""

    def write(name: str, **parts: Lora) -> Path:
        path = tmp_path_factory.mktemp("adapters") / f"{name}.safetensors"
        save_file(lora_tensors(**parts), path)
        return path

    @cache
    def adapters(family: str) -> Any:
        pipe = FAMILIES[family](PLAIN[family])
        for name, path in files(pipe, write, text=False).items():
            pipe.load_lora_weights(path, adapter_name=name)
        return pipe

    return adapters


SCHEDULES: dict[str, tuple[list[Any], list[list[float]]]] = {
    "on and off, beside a number": (["0:1,0.5:0", 0.6], [[1, 0.6], [1, 0.6], [0, 0.6], [0, 0.6]]),
    "a ramp, and a list": (["1..0.4", [0, 1, 0.5, -1]], [[1, 0], [0.8, 1], [0.6, 0.5], [0.4, -1]]),
}


@pytest.mark.parametrize("family", slow_but(["sd"], FAMILIES))
@pytest.mark.parametrize("case", SCHEDULES)
def test_merging_by_a_schedule_equals_setting_the_adapters_before_every_step(load, adapters, family, case):
    given, expected = SCHEDULES[case]
    assert_close(latents_of(load(family), "merge", given), by_hand(adapters(family), lambda step: expected[step]))


@pytest.mark.parametrize("method", slow_but(("tara", "composite", "lora-composer", "clora", "draft"), METHODS))
def test_every_step_of_every_method_has_its_own_weight(load, method):
    pipe = load("sd")

    def by_step(weights: Sequence[Any]) -> list[Tensor]:
        seen: list[Tensor] = []

        def see(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            seen.append(tensors["latents"].clone())
            return tensors

        compose(pipe, method, weights, steps=2, callback_on_step_end=see)
        return seen

    changing, constant = by_step([[0.4, 1.5], [1.0, 0.2]]), by_step([0.4, 1.0])
    assert_close(changing[0], constant[0])
    assert far_apart(changing[1], constant[1])


@dataclass
class Probe:
    """The process of a method that in every step runs all that a denoiser can, at the same latents and timestep.

    Attributes:
        session: Runs the UNet.
        spec: Every concept everywhere.
        seen: Maps, losses, the direction of the gradient, and predictions, by step.
        start: The latents and the step that come first.
    """

    session: Session
    spec: Pass
    seen: list[list[Tensor]]
    start: tuple[Tensor, Step] | None = None

    @property
    def text(self) -> Conditioning:
        return self.spec.text

    def prepare(self, latents: Tensor, first: Step) -> Tensor:
        self.start = latents, first
        return latents

    def step(self, latents: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        assert self.start is not None
        denoiser, request = self.session.denoiser, MapRequest(self.text.conditional().trigger_mask)
        what = self.start[0], replace(step, t=self.start[1].t), denoiser.prepare(self.spec)
        maps = denoiser.maps(*what, request).text
        found = denoiser.gradient(*what, MapLoss(request, lambda maps: maps.text.square().sum(dim=(1, 2))))
        prediction = denoiser.predict(*what)
        self.seen.append([maps, found.losses, found.direction / found.direction.std(), prediction.model_output])
        return latents, self.session.guider.combine(prediction, step)


@dataclass(frozen=True)
class Probing(Settings):
    """The settings of `Probe`."""

    branch_batch_size: int | None
    seen: list[list[Tensor]] = field(default_factory=list)

    def start(self, session: Session) -> Probe:
        gates = constant_gates(session, session.concepts.with_styles(session.concepts.subjects))
        spec = Pass(session.prompts.encode(), gates, branch_batch_size=self.branch_batch_size)
        return Probe(session, spec, self.seen)


@pytest.mark.parametrize("branch_batch_size", slow_but([None], [None, 1]))
def test_losses_gradients_maps_and_predictions_have_the_weight_of_their_step(load, branch_batch_size):
    pipe = load("sd")

    def interrupt(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = True
        return tensors

    def seen(weights: Sequence[Any], **how: Any) -> list[list[Tensor]]:
        probing = Probing(branch_batch_size)
        compose(pipe, probing, weights, steps=3, **how)
        return probing.seen

    changing = seen([[0.3, 1.4, 0.3], [1.0, -0.5, 0.2]])
    for step, weights in enumerate(([0.3, 1.0], [1.4, -0.5], [0.3, 0.2])):
        (alone,) = seen(weights, callback_on_step_end=interrupt)
        for one, other in zip(changing[step], alone, strict=True):
            assert_close(one, other)
    assert far_apart(changing[0][3], changing[1][3])


@pytest.mark.parametrize(("method", "weight", "times"), [
    ("merge", 1.0, 1), ("merge", "0:1,0.5:0", 2), ("regional", "1..0.4", STEPS),
    (LoraComposer(step_size=0), "0:1,0.5:0", 2),
])  # fmt: skip
def test_keys_and_values_of_the_text_are_made_once_for_every_weight(load, method, weight, times):
    pipe = load("sd")
    counted: list[int] = []
    layer = pipe.unet.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k")
    hook = layer.register_forward_hook(lambda *_: counted.append(1))
    compose(pipe, method, [weight, 0.5])
    hook.remove()
    assert len(counted) == times


@pytest.mark.parametrize("method", slow_but(["lora-composer"], ["lora-composer", "clora"]))
def test_keys_and_values_of_earlier_weights_are_not_kept(load, method, monkeypatch):
    """Those of all steps would take more memory than the model; updates and predictions have one each."""
    pipe, alive, kept = load("sd"), WeakSet(), []

    class Watched(TextKV):
        def __init__(self) -> None:
            super().__init__()
            alive.add(self)

    def count(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        kept.append(len(alive))
        return tensors

    monkeypatch.setattr("lora_compose.pipelines.denoising.prepared_pass.TextKV", Watched)
    for weights in ([0.5, 0.6], ["1..0.4", "0.2..0.6"]):
        compose(pipe, method, weights, steps=3, callback_on_step_end=count)
        assert not alive
    constant, scheduled = kept[: len(kept) // 2], kept[len(kept) // 2 :]
    assert all(now <= before for before, now in zip(constant, scheduled, strict=True))
    assert 1 <= max(kept) <= 4


def test_what_is_constant_is_folded_also_beside_a_schedule(load):
    """Layers of the numbers alone cost nothing in any step, and those with a schedule have its ranks only."""
    pipe, ranks = load("sd"), []

    def look(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        bank = [module for module in pipe.unet.modules() if isinstance(module, BankLayer)]
        ranks.append({layer.key.ranks for layer in bank})
        return tensors

    for weights in ([0.5, 0.6], ["1..0.4", 0.6], ["1..0.4", "0:1,0.5:0"]):
        compose(pipe, "merge", weights, steps=1, callback_on_step_end=look)
    assert ranks == [set(), {(3, 0)}, {(3, 3)}]


def test_the_text_has_the_mean_of_the_weights(load, caplog):
    pipe = load("sdxl", text=True)
    for concept in ("cat", "dog"):  # the text encoders alone
        loaded = pipe.library.loaded[concept]
        pipe.library.loaded[concept] = replace(loaded, factors=replace(loaded.factors, model={}))
    found = latents_of(pipe, "merge", ["0:1,0.25:0.2", 0.6])
    said = [record.getMessage() for record in caplog.records if "text is encoded once" in record.getMessage()]
    assert said == ["the text is encoded once, so the text-encoder part of 'cat' has the mean weight of its schedule, "
                    "0.4, in all steps"]  # fmt: skip
    assert_close(found, latents_of(pipe, "merge", [0.4, 0.6]))
    assert far_apart(found, latents_of(pipe, "merge", [1.0, 0.6]))


# Blocks

BLOCKS = {"down": 0.5, "down.0": 0.2, "mid": -1.0, "up_blocks.1": 0.0}


def scaled(lora: Lora) -> Lora:
    """The factors as a file would hold them in which every block is scaled."""
    by = {"down_blocks.0": 0.2, "down_blocks": 0.5, "mid_block": -1.0, "up_blocks.1": 0.0}

    def factor(name: str) -> float:
        return next((value for block, value in by.items() if name.startswith(f"{block}.")), 1.0)

    return {name: replace(factors, up=factors.up * factor(name)) for name, factors in lora.items()}


@pytest.mark.parametrize(("family", "method"), IN_FAMILIES)
def test_factors_by_block_equal_a_file_whose_blocks_are_scaled(load, write_lora, family, method):
    pipe = load(family)
    lora = random_lora(pipe.unet, 0, targets=EVERYTHING, size=0.15)
    pipe.load_concept(write_lora("scaled", unet=scaled(lora)), "scaled", trigger="sks", class_word="cat")
    dog = Concept(name="dog", region=BOXES["dog"])
    by_block = Concept(name="cat", region=BOXES["cat"], blocks=BLOCKS, weight="1..0.5")
    by_file = Concept(name="scaled", region=BOXES["cat"], weight="1..0.5")
    found = latents_of(pipe, method, (1, 1), concepts=[by_block, dog], steps=2)
    assert_close(found, latents_of(pipe, method, (1, 1), concepts=[by_file, dog], steps=2))


def test_factors_by_block_equal_those_of_diffusers(load, write_lora):
    """Which has them for layers of attention blocks."""
    pipe, plain = load("sd"), FAMILIES["sd"](PLAIN["sd"])
    path = write_lora("attention", unet=random_lora(pipe.unet, 3))
    pipe.load_concept(path, "attention", trigger="sks")
    plain.load_lora_weights(path, adapter_name="attention")
    plain.set_adapters("attention", {"unet": {"down": 0.5, "mid": 2.0, "up": -0.3}})
    given = {"num_inference_steps": 2, "output_type": "latent"}
    blocks = {"down": 0.5, "mid": 2.0, "up": -0.3}
    expected = plain(PROMPT, **given, generator=seeded()).images
    concept = Concept(name="attention", blocks=blocks)
    found = pipe(PROMPT, **given, generator=seeded(), concepts=[concept], method="merge").images
    assert_close(found, expected)


def test_a_factor_on_the_text_encoders(load):
    pipe = load("sd", text=True)
    concepts = [Concept(name="cat", blocks={"text": 0.0}), "dog"]
    found = latents_of(pipe, "merge", (1, 1), concepts=concepts, steps=2)
    assert far_apart(found, latents_of(pipe, "merge", [1.0, 1.0], steps=2))
    loaded = pipe.library.loaded["cat"]
    pipe.library.loaded["cat"] = replace(loaded, factors=replace(loaded.factors, text_encoders={}))
    assert_close(found, latents_of(pipe, "merge", [1.0, 1.0], steps=2))


def test_blocks_that_a_unet_does_not_have_are_named_before_anything_happens(load):
    pipe = load("sd")
    with pytest.raises(
        ValueError, match=r"'cat' has a factor for 'up.7', but this model has down_blocks.0, down_blocks"
    ):
        compose(pipe, "merge", (1, 1), concepts=[Concept(name="cat", blocks={"up.7": 0.5})])


def test_a_factor_without_effect_is_mentioned(load, caplog):
    compose(load("sd"), "merge", (1, 1), concepts=[Concept(name="cat", blocks={"text": 0.5, "mid": 1})], steps=1)
    assert "the LoRA of 'cat' changes nothing in text, so a factor there has no effect" in caplog.text
    assert "in mid" not in caplog.text


@pytest.mark.usefixtures("costs_do_not_matter")
def test_check_says_weights_blocks_and_roles_and_finds_unknown_blocks(playground):
    bear = Concept(name="my bear", lora="playground:bear", trigger="xlo", class_word="bear", weight="1..0.4",
                   blocks={"down": 0.5})  # fmt: skip
    ink = Concept(name="ink", lora="playground:robot", trigger="", role="style", weight=(1, 0))
    robot = Concept(name="robot", role="bystander")
    scene = Scene(prompt="a xlo bear and a robot on grass", concepts=(bear, ink, robot))
    report = check(Run(scene=scene, model="playground", method="merge", steps=2), playground)
    facts = dict(report.facts)
    assert report.problems == ()
    assert (facts["my bear: weight"], facts["my bear: blocks"]) == ("1..0.4", "down:0.5")
    assert (facts["ink: weight"], facts["ink: role"]) == ("1,0", "style, everywhere")
    assert facts["ink: words"] == "no trigger given, so it acts on all"
    of_robot = [facts[f"robot: {name}"] for name in ("file", "role", "words")]
    assert of_robot == ["none", "bystander, without a LoRA", "looked for by its class word 'robot'"]
    wrong = scene.model_copy(update={"concepts": (bear.model_copy(update={"blocks": {"up.9": 1.0}}),)})
    report = check(Run(scene=wrong, model="playground", method="merge", steps=2), playground)
    assert any("'my bear' has a factor for 'up.9'" in problem for problem in report.problems)


@pytest.mark.usefixtures("small_by_default")
def test_an_image_with_all_of_it_is_made_again_from_what_it_carries(playground, tmp_path):
    bear = Concept(
        name="my bear", lora="playground:bear", trigger="xlo", class_word="bear", weight="0:1..0.5:0.4,0.8:0",
        blocks={"down": 0.5, "text": 0}, negative_prompt="blue",
    )  # fmt: skip
    ink = Concept(name="ink", lora="playground:robot", trigger="", role="style", weight=(0.5, 0.2))
    scene = Scene(prompt="a xlo bear on grass", concepts=(bear, ink))
    made = make(playground, Run(scene=scene, model="playground", method="switch", steps=1))
    record = read_record(save_image(made.image, tmp_path / "1.png", made.record))
    assert record.run.scene.concepts == scene.concepts
    again = remake(playground, record, runnable(record, None), lambda share: None)
    assert difference(made.image, again.image) is None
