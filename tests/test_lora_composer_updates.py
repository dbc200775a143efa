"""Updates of the latents in LoRA-Composer: gradient, step sizes, when they stop, and images that do not know others.

Yang et al., "LoRA-Composer", arXiv 2403.11627, equations 3 to 10.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from lora_compose.pipelines.engine import Engine
from torch import Tensor

from components import random_lora, sd_unet, seeded, small_pipeline, tiny_pipeline
from lora_compose.attention import Recorder
from lora_compose.compose.benchmark.counting import count_run
from lora_compose.pipelines.families.stable_diffusion import ComposeStableDiffusionPipeline
from lora_compose.pipelines.methods.lora_composer import Composing, LoraComposer
from lora_compose.pipelines.scene import Concept

PROMPT = "a sks cat and a zwx dog on grass"
TRIGGERS = {"cat": "sks", "dog": "zwx"}
PHI = {0: 20.0, 1: 19.898, 25: 17.261}
"""Published step sizes at some of 50 steps."""

NUMPY_2 = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

Look = Callable[[Composing, Tensor, Tensor], None]
"""Looks at a process before a step: the process, the latents and the timestep."""


@dataclass(frozen=True)
class Watched(LoraComposer):
    """LoRA-Composer under observation.

    look: Called before every step.
    moves: What every step did to the latents before the scheduler.
    losses: The losses before every step, from a pass that only observes.
    """

    look: Look | None = None
    moves: list[Tensor] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)

    def start(self, engine: Engine) -> Any:
        process: Any = super().start(engine)
        return Watching(self, process)

    def updates_of(self, image: int) -> list[int]:
        """The steps in which an image was updated."""
        return [step for step, move in enumerate(self.moves) if move[image].any()]


@dataclass
class Watching:
    watched: Watched
    process: Composing

    def prepare(self, latents: Tensor) -> Tensor:
        return self.process.prepare(latents)

    def step(self, latents: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        if self.watched.look is not None:
            self.watched.look(self.process, latents, t)
        if self.process.targets:
            self.watched.losses.append(losses_of(self.process, latents, t)[0])
        moved, output = self.process.step(latents, t)
        self.watched.moves.append(moved - latents)
        return moved, output


def watched(settings: LoraComposer, look: Look | None = None) -> Watched:
    return Watched(**vars(settings), look=look)


@pytest.fixture
def load(write_lora) -> Callable[..., Any]:
    """Loads the concepts "cat" and "dog"."""

    def load(pipe: Any) -> Any:
        for seed, (name, trigger) in enumerate(TRIGGERS.items()):
            path = write_lora(f"{name}-file", unet=random_lora(pipe.unet, seed))
            pipe.load_concept(path, name, trigger=trigger, class_word=name)
        return pipe

    return load


@pytest.fixture
def composer(load) -> ComposeStableDiffusionPipeline:
    """A small pipeline with both concepts, for canvases of 64 x 64."""
    return load(tiny_pipeline())


def side_by_side(width: int = 64, height: int = 64) -> list[Concept]:
    boxes = {"cat": (0, 0, width // 2, height), "dog": (width // 2, 8, width, height)}
    return [Concept(name=name, region=box) for name, box in boxes.items()]


def compose(pipe: Any, method: LoraComposer, prompt: str | list[str] = PROMPT, **arguments: Any) -> Any:
    given = {"concepts": side_by_side(), "num_inference_steps": 2, "width": 64, "height": 64, "guidance_scale": 1.0}
    return pipe(prompt, method=method, **{"output_type": "latent", "generator": seeded()} | given | arguments)


def assert_close(one: Tensor, other: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


def rms(x: Tensor) -> Tensor:
    return x.square().mean(dim=(1, 2, 3)).sqrt()


def losses_of(process: Composing, latents: Tensor, t: Tensor) -> tuple[Tensor, Recorder]:
    """The losses of a pass that only observes."""
    recorder = process._recorder()
    process.engine.observe(latents, t, process.conditioning, process.gates, recorder, process.layout)
    return process.loss(recorder), recorder


def gradient_of(process: Composing, latents: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    what = (process.conditioning, process.gates, process._recorder(), process.loss, process.layout)
    found = process.engine.gradient(latents, t, *what)
    return found.losses, found.direction


def at_the_first_step(pipe: Any, look: Look, settings: LoraComposer | None = None, **arguments: Any) -> None:
    """Looks at a process in its first step."""
    looked: list[bool] = []

    def once(process: Composing, latents: Tensor, t: Tensor) -> None:
        if not looked:
            look(process, latents, t)
        looked.append(True)

    compose(pipe, watched(settings or LoraComposer(apart=0), once), **arguments)
    assert looked


# The gradient


@pytest.mark.parametrize("build", [tiny_pipeline, small_pipeline], ids=["tiny", "small"])
def test_the_gradient_is_the_slope_of_the_loss(load, build):
    def look(process: Composing, latents: Tensor, t: Tensor) -> None:
        losses, gradient = gradient_of(process, latents, t)
        assert_close(losses, losses_of(process, latents, t)[0], 1e-6)
        for seed in range(3):
            along = gradient / rms(gradient)[:, None, None, None] + torch.randn(latents.shape, generator=seeded(seed))
            ahead, behind = (losses_of(process, latents + side * along, t)[0] for side in (1e-3, -1e-3))
            slope = (gradient * along).sum(dim=(1, 2, 3))
            torch.testing.assert_close((ahead - behind) / 2e-3, slope, rtol=0.01, atol=0)

    pipe = load(build())
    at_the_first_step(pipe, look, num_images_per_prompt=2, width=128, height=128, concepts=side_by_side(128, 128))


def test_a_small_update_lowers_the_loss(composer):
    settings = LoraComposer(apart=0, step_size=0.02)

    def look(process: Composing, latents: Tensor, t: Tensor) -> None:
        before, _ = losses_of(process, latents, t)
        after, _ = losses_of(process, process._update(latents, t), t)
        assert (after < before).all()

    at_the_first_step(composer, look, settings, num_images_per_prompt=3)


@NUMPY_2
@pytest.mark.parametrize("rule", ["raw", "rms"])
def test_schedulers_that_scale_the_input_get_a_direction_in_the_scale_of_the_latents(composer, rule):
    composer.scheduler = EulerDiscreteScheduler.from_config(composer.scheduler.config)

    def look(process: Composing, latents: Tensor, t: Tensor) -> None:
        _, direction = gradient_of(process, latents, t)
        with torch.enable_grad():
            moving = latents.detach().requires_grad_()
            loss, _ = losses_of(process, moving, t)
            (by_hand,) = torch.autograd.grad(loss.sum(), moving)
        scale_squared = composer.scheduler.sigmas[0] ** 2 + 1
        assert scale_squared > 100
        expected = scale_squared * by_hand
        assert ((direction - expected).abs().max() / expected.abs().max()) < 1e-4
        step = process.settings.step_size * (direction if rule == "raw" else direction / rms(direction))
        torch.testing.assert_close(process._update(latents, t), latents - step, rtol=1e-5, atol=1e-5)

    at_the_first_step(composer, look, LoraComposer(apart=0, step_rule=rule, step_size=0.5))


def test_the_gradient_leaves_no_trace(composer):
    composer.unet.down_blocks[0].requires_grad_(False)
    asking = {name: parameter.requires_grad for name, parameter in composer.unet.named_parameters()}
    assert len(set(asking.values())) == 2

    def look(process: Composing, latents: Tensor, t: Tensor) -> None:
        asking_inside = [parameter.requires_grad for parameter in composer.unet.parameters()]
        losses, gradient = gradient_of(process, latents, t)
        assert not losses.requires_grad
        assert not gradient.requires_grad
        assert losses.dtype == gradient.dtype == torch.float32
        assert losses.shape == (1,)
        assert gradient.shape == latents.shape
        assert not latents.requires_grad
        assert [parameter.requires_grad for parameter in composer.unet.parameters()] == asking_inside
        assert all(parameter.grad is None for parameter in composer.unet.parameters())

    at_the_first_step(composer, look)
    assert {name: parameter.requires_grad for name, parameter in composer.unet.named_parameters()} == asking
    models = (composer.unet, composer.text_encoder, composer.vae)
    assert all(parameter.grad is None for model in models for parameter in model.parameters())


def test_gradient_checkpointing_changes_nothing(composer):
    settings = LoraComposer(least_updates=1.0, most_updates=1.0)
    expected = compose(composer, settings, num_inference_steps=3).images
    composer.unet.enable_gradient_checkpointing()
    assert_close(compose(composer, settings, num_inference_steps=3).images, expected)


def test_where_memory_does_not_suffice_for_a_gradient_the_error_says_what_needs_less(composer, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate 40 GiB")

    monkeypatch.setattr(torch.autograd, "grad", full)
    for checkpointing in (False, True):
        if checkpointing:
            composer.unet.enable_gradient_checkpointing()
        with pytest.raises(torch.OutOfMemoryError) as caught:
            compose(composer, LoraComposer())
        notes = getattr(caught.value, "__notes__", [])
        assert len(notes) == (0 if checkpointing else 1)
        assert all("pipe.unet.enable_gradient_checkpointing(), or --save-memory gradient" in note for note in notes)


def test_there_are_no_updates_in_inference_mode(composer):
    expected = compose(composer, LoraComposer()).images
    with torch.inference_mode():
        compose(composer, LoraComposer(step_size=0))
        with pytest.raises(RuntimeError, match=r"needs gradients: call it outside torch.inference_mode\(\)"):
            compose(composer, LoraComposer())
    assert torch.equal(compose(composer, LoraComposer()).images, expected)


def test_a_gradient_that_is_not_finite_is_reported_with_its_step(composer):
    def spoil(pipe, step, timestep, tensors):
        return {"latents": tensors["latents"] * (math.nan if step == 1 else 1)}

    settings = LoraComposer(least_updates=1.0, most_updates=1.0)
    with pytest.raises(ValueError, match="the gradient at step 2 is not finite"):
        compose(composer, settings, num_inference_steps=4, callback_on_step_end=spoil)


# The loss


def test_the_loss_is_the_weighted_sum_of_its_terms(composer):
    weights = {"ce_weight": 8.0, "fill_weight": 2.0, "region_weight": 10.0}

    def look(process: Composing, latents: Tensor, t: Tensor) -> None:
        _, recorder = losses_of(process, latents, t)

        def loss(**given: float) -> Tensor:
            settings: dict[str, Any] = {name: given.get(name, 0.0) for name in weights}
            return replace(process, settings=LoraComposer(**settings)).loss(recorder)

        terms = {name: loss(**{name: 1.0}) for name in weights}
        assert all((term > 0).all() for term in terms.values())
        expected = torch.stack([weight * terms[name] for name, weight in weights.items()]).sum(dim=0)
        assert_close(loss(**weights), expected, 1e-5)
        assert loss().abs().max() == 0
        # Nobody's words but their own count: the terms are a sum over the concepts.
        alone = []
        for n, target in enumerate(process.targets):
            maps = Recorder(recorder.layers, recorder.readout[[n]], recorder.self_layers)
            maps.maps = {name: each[[n]] for name, each in recorder.maps.items()}
            maps.self_maps = recorder.self_maps
            alone.append(replace(process, targets=[target]).loss(maps))
        assert_close(alone[0] + alone[1], process.loss(recorder), 1e-5)

    at_the_first_step(composer, look, num_images_per_prompt=2)


def test_self_attention_is_recorded_only_for_the_loss_that_looks_at_it(composer):
    def look(process: Composing, latents: Tensor, t: Tensor) -> None:
        _, recorder = losses_of(process, latents, t)
        assert bool(recorder.self_maps) == (process.settings.region_weight > 0)

    for weight in (0.0, 1.0):
        at_the_first_step(composer, look, LoraComposer(apart=0, region_weight=weight))


@pytest.mark.parametrize("changes", [
    {"step_size": 0}, {"ce_weight": 0, "fill_weight": 0, "region_weight": 0}, {"most_updates": 0, "least_updates": 1},
    {"inject": "off", "reinit": "copy"},
], ids=["no step", "no loss", "no time", "nothing read"])  # fmt: skip
def test_without_anything_to_gain_there_is_no_pass_for_it(composer, changes):
    cost = compose(composer, LoraComposer(apart=0, **changes), num_inference_steps=3).cost
    assert (cost.rows_forward, cost.rows_stopped, cost.rows_backward) == (3, 0, 0)


# When and how far


@pytest.mark.parametrize("rule", ["raw", "rms"])
@pytest.mark.parametrize(("decay", "sizes"), [
    (0.5, PHI), (1.0, {0: 20.0, 1: 20 - 10 / 49, 25: 20 - 250 / 49}),
], ids=["code", "paper"])  # fmt: skip
def test_step_sizes_fall_as_published(composer, rule, decay, sizes):
    factor = 1 if rule == "raw" else 0.01  # of the published size: gradients of a small model are small
    gradients: dict[int, Tensor] = {}

    def look(process: Composing, latents: Tensor, t: Tensor) -> None:
        if process.engine.step in sizes:
            gradients[process.engine.step] = gradient_of(process, latents, t)[1]

    settings = LoraComposer(step_rule=rule, step_size=20 * factor, step_decay=decay, least_updates=0.5, apart=0)
    method = watched(settings, look)
    compose(composer, method, num_inference_steps=50)
    for step, size in sizes.items():
        expected = gradients[step] if rule == "raw" else gradients[step] / rms(gradients[step])
        found = (method.moves[step] * expected).sum() / expected.square().sum()
        assert found.item() == pytest.approx(-size * factor, rel=2e-4)
        assert_close(method.moves[step], found * expected)


def expected_updates(losses: Sequence[float], steps: int, least: float, most: float) -> int:
    """How many updates an image gets, from the loss before each."""
    if most == 0:
        return 0
    for step in range(steps):
        if step > most * steps:
            return step
        if step > 0 and step >= least * steps and losses[step] > losses[step - 1]:
            return step + 1
    return steps


def check_schedule(method: Watched, images: int, steps: int) -> list[int]:
    """The number of updates of every image, checked against the losses."""
    counts = []
    for image in range(images):
        updated = method.updates_of(image)
        losses = [loss[image].item() for loss in method.losses]
        assert updated == list(range(expected_updates(losses, steps, method.least_updates, method.most_updates)))
        counts.append(len(updated))
    return counts


def test_the_official_schedule_updates_6_to_26_of_50_steps(composer):
    method = watched(LoraComposer.official())
    compose(composer, method, num_inference_steps=50, num_images_per_prompt=4)
    counts = check_schedule(method, 4, 50)
    assert all(6 <= count <= 26 for count in counts)
    assert min(counts) < 26, "an image whose loss rises is to be among them"
    loaded = composer.resolve_concepts(side_by_side())
    counted = count_run(composer, LoraComposer.official(), loaded, 50, 7.5, 64, 64)
    assert (counted.rows_forward, counted.rows_backward) == (100, 26)


@pytest.mark.parametrize(("least", "most", "fewest", "largest"), [
    (0.0, 0.0, 0, 0), (1.0, 0.0, 0, 0), (0.0, 1.0, 2, 10), (0.5, 0.5, 6, 6), (0.25, 0.55, 4, 6), (1.0, 1.0, 10, 10),
])  # fmt: skip
def test_updates_lie_between_the_fewest_and_the_most(composer, least, most, fewest, largest):
    method = watched(LoraComposer(least_updates=least, most_updates=most, apart=0, step_size=0.3))
    cost = compose(composer, method, num_inference_steps=10, num_images_per_prompt=3).cost
    counts = check_schedule(method, 3, 10)
    assert all(fewest <= count <= largest for count in counts)
    assert cost.rows_backward == 3 * max(counts)


def test_the_update_of_the_step_whose_loss_rises_is_still_applied(composer):
    method = watched(LoraComposer(least_updates=0.0, most_updates=1.0, apart=0, step_size=0.3))
    compose(composer, method, num_inference_steps=8, num_images_per_prompt=6)
    counts = check_schedule(method, 6, 8)
    assert min(counts) < max(counts)
    for image, count in enumerate(counts):
        if count == 8:
            continue
        losses = [loss[image].item() for loss in method.losses[:count]]
        assert losses[-1] > losses[-2]
        assert losses[:-1] == sorted(losses[:-1], reverse=True)
        assert rms(method.moves[count - 1])[image].item() == pytest.approx(
            0.3 * math.sqrt(1 - 0.5 * (count - 1) / 7), rel=1e-3
        )
        assert not any(move[image].any() for move in method.moves[count:])


# Images do not know each other


@pytest.mark.parametrize("changes", [
    {}, {"reinit": "copy"}, {"reinit": "swap", "rows": "all"}, {"step_rule": "raw", "step_size": 20.0},
], ids=["rms", "copy", "swap", "raw"])  # fmt: skip
def test_images_of_a_batch_equal_single_images_also_where_they_stop(composer, changes):
    options = {"least_updates": 0.0, "most_updates": 1.0, "apart": 0.3, "step_size": 0.3} | changes
    prompts = [PROMPT, "the zwx by the sks cat in the water"]
    arguments = {"num_inference_steps": 6, "guidance_scale": 4.0}
    method = watched(LoraComposer(**options))
    generators = [seeded(seed) for seed in range(4)]
    together = compose(composer, method, prompts, num_images_per_prompt=2, generator=generators, **arguments).images
    stops = check_schedule(method, 4, 6)
    assert len(set(stops)) > 1, "images are to stop at different steps"
    for row in range(4):
        alone = watched(LoraComposer(**options))
        one = compose(composer, alone, prompts[row // 2], generator=seeded(row), **arguments).images
        assert check_schedule(alone, 1, 6) == [stops[row]]
        assert_close(together[row], one[0], 1e-3)


@pytest.mark.parametrize("settings", [LoraComposer(), LoraComposer.official(), LoraComposer(reinit="swap")],
                         ids=["default", "official", "swap"])  # fmt: skip
def test_a_second_call_gives_the_bits_of_a_new_pipeline(composer, load, write_lora, settings):
    arguments = {"num_inference_steps": 4, "guidance_scale": 4.0}
    compose(composer, settings, "zwx dog and sks cat", width=128, height=64, generator=seeded(5))
    second, third = (compose(composer, settings, **arguments).images for _ in range(2))
    fresh = compose(load(tiny_pipeline()), settings, **arguments).images
    assert torch.equal(second, fresh)
    assert torch.equal(third, fresh)
    assert not torch.equal(compose(composer, settings, generator=seeded(1), **arguments).images, fresh)


def test_reinitialisation_moves_noise_before_the_first_step_and_keeps_its_values(composer):
    starts: dict[str, Tensor] = {}
    for mode in ("off", "copy", "swap"):

        def look(process: Composing, latents: Tensor, t: Tensor) -> None:
            starts[process.settings.reinit] = latents.clone()

        at_the_first_step(composer, look, LoraComposer(apart=0, reinit=mode, step_size=0), num_images_per_prompt=2)
    before = starts["off"]
    assert not torch.equal(starts["swap"], before)
    assert torch.equal(starts["swap"].flatten(2).sort(dim=2).values, before.flatten(2).sort(dim=2).values)
    for moment in (Tensor.mean, Tensor.std):
        assert_close(moment(starts["copy"], dim=(1, 2, 3)), moment(before, dim=(1, 2, 3)))


def test_a_unet_of_three_attention_levels_is_observed_on_the_coarsest(load):
    pipe = load(small_pipeline(unet=sd_unet()))
    pipe.set_progress_bar_config(disable=True)

    def look(process: Composing, latents: Tensor, t: Tensor) -> None:
        assert [target.region.shape for target in process.targets] == [(4, 6), (4, 6)]
        _, recorder = losses_of(process, latents, t)
        assert len(recorder.maps) == len(recorder.self_maps) == 5
        assert recorder.self_mean().shape == (1, 24, 24)

    at_the_first_step(pipe, look, width=192, height=128, concepts=side_by_side(192, 128))
