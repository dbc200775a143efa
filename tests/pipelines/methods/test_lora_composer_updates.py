"""What moves latents in LoRA-Composer: losses on attention maps, re-initialisation, gradients, and when updates stop.

Yang et al., "LoRA-Composer", arXiv 2403.11627, sections 3.3 to 3.5 and equations 3 to 10. For losses and
re-initialisation, queries and keys are taken from diffusers' own UNet with dense LoRAs; everything after them is in
double precision, with the published constants written out.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler, StableDiffusionPipeline
from safetensors.torch import save_file
from scipy.ndimage import convolve1d
from torch import Tensor

from comparisons import assert_close
from components import State, filled, random_lora, save_lora, seeded, small_pipeline, tiny_pipeline, with_library
from lora_compose.attention import Lora
from lora_compose.compose.benchmark.counting import count_run
from lora_compose.pipelines.denoising.passes import AttentionMaps, Gradient, MapLoss
from lora_compose.pipelines.families.stable_diffusion import ComposeStableDiffusionPipeline
from lora_compose.pipelines.methods.lora_composer import Composing, LoraComposer
from lora_compose.pipelines.scene.canvas import Step
from lora_compose.pipelines.scene.scene import Concept
from reference import WrittenOut, cells
from watched import Look, Watched, once

TRIGGERS = {"cat": "sks", "dog": "zwx"}

# Against the equations, on the maps of a plain model

CANVAS = (256, 384)
BOXES = {"cat": (32, 32, 128, 160), "dog": (192, 64, 352, 160)}
"""Unequal, with background between them: 4 x 3 and 3 x 5 cells of the map grid."""

GRID = (8, 12)

TEXTS = {"cat": "a sks cat on grass", "dog": "one zwx dog at night"}
WORDS = (2, 3)
"""The tokens of trigger and class word in both texts, after the start token and one word."""

MAP_LAYERS = tuple(
    f"{block}.attentions.{i}.transformer_blocks.0"
    for block, layers in (("down_blocks.2", 2), ("up_blocks.1", 3))
    for i in range(layers)
)
"""The blocks on the grid of 1/32 of the image."""


SHARPER = 30


@dataclass(frozen=True)
class Maps:
    """Mean over layers and heads, in double precision.

    words: attention of all cells to the words of each concept's own text. Shape: [words, height, width] each.
    looks: attention of cells to each other, isolated. Shape: [cells, cells].
    """

    words: Mapping[str, np.ndarray]
    looks: np.ndarray


@pytest.fixture(scope="module")
def trained(tmp_path_factory: Any) -> tuple[Any, Any, dict[str, Lora]]:
    """A composing pipeline, diffusers' own with the same weights, and the LoRAs of both concepts."""
    pipe, plain = small_pipeline(), small_pipeline(StableDiffusionPipeline)
    for each in (pipe, plain):
        each.set_progress_bar_config(disable=True)
        filled(each.text_encoder, seed=18)  # with which every constant matters, and noise comes from places apart
        for name, parameter in each.unet.named_parameters():
            if name.endswith("to_q.weight"):  # attention of random weights is almost the same everywhere
                parameter.data *= SHARPER
    loras = {name: random_lora(pipe.unet, seed) for seed, name in enumerate(BOXES)}
    for name, lora in loras.items():
        tensors = {}
        for layer, factors in lora.items():
            tensors[f"unet.{layer}.lora_A.weight"], tensors[f"unet.{layer}.lora_B.weight"] = factors.down, factors.up
        path = tmp_path_factory.mktemp("loras") / f"{name}.safetensors"
        save_file(tensors, path, metadata={"format": "pt"})
        pipe.load_concept(path, name, trigger=TRIGGERS[name], class_word=name)
    return pipe, plain, loras


def process_of(pipe: Any, method: Watched) -> Composing:
    """The process of a call of one step."""
    concepts = [Concept(name=name, region=box, prompt=TEXTS[name]) for name, box in BOXES.items()]
    pipe(
        "on grass", concepts=concepts, method=method, num_inference_steps=1, guidance_scale=1.0, width=CANVAS[1],
        height=CANVAS[0], generator=seeded(), output_type="latent",
    )  # fmt: skip
    return method.process


class SeenError(Exception):
    """All layers with maps have run."""


def seen(*_: Any) -> None:
    raise SeenError


@torch.no_grad()
def plain_maps(plain: Any, loras: Mapping[str, Lora], isolate: bool = True) -> Maps:
    """The maps of the first pass with injection into attn2, from a plain model."""
    grids = [(-(-CANVAS[0] // side), -(-CANVAS[1] // side)) for side in (8, 16, 32, 64)]
    regions = {grid: torch.stack([cells(box, CANVAS, grid) for box in BOXES.values()], dim=-1) for grid in grids}
    flat = {height * width: member.flatten(0, 1) for (height, width), member in regions.items()}
    encoded = [plain.encode_prompt(text, "cpu", 1, False)[0] for text in ("on grass", *TEXTS.values())]
    nothing = {name: replace(factors, scale=0.0) for name, factors in loras["cat"].items()}
    what = flat, torch.ones(1, 1, 1), torch.stack(encoded), [nothing, *loras.values()], isolate
    written = {name: WrittenOut(name.removesuffix(".processor"), *what) for name in plain.unet.attn_processors}
    plain.unet.set_attn_processor(dict(written))
    plain.scheduler.set_timesteps(1)
    latents = torch.randn(1, 4, CANVAS[0] // 8, CANVAS[1] // 8, generator=seeded())
    last = plain.unet.up_blocks[1].register_forward_hook(seen)  # the finer layers after it take half of the time
    with pytest.raises(SeenError):
        plain.unet(latents, plain.scheduler.timesteps[0], encoded[0])
    last.remove()
    cross, own = (
        np.mean(
            [torch.stack(written[f"{layer}.{part}.processor"].seen).numpy() for layer in MAP_LAYERS], axis=(0, 2, 3)
        )
        for part in ("attn2", "attn1")
    )  # over layers, the only row, and heads
    words = {name: cross[1 + n][:, list(WORDS)].T.reshape(2, *GRID) for n, name in enumerate(BOXES)}
    return Maps(words, own[0])


@pytest.fixture(scope="module")
def maps(trained: Any) -> Maps:
    """With isolation."""
    return plain_maps(*trained[1:])


@pytest.fixture(scope="module")
def open_maps(trained: Any) -> Maps:
    """Without isolation."""
    return plain_maps(*trained[1:], isolate=False)


@dataclass(frozen=True)
class Published:
    """The constants of the code, and those of the paper where they differ."""

    kernel: tuple[float, float, float] = (0.21194156, 0.57611688, 0.21194156)
    spread: float = 1.0
    part: float = 0.2
    ce: float = 8.0
    fill: float = 2.0
    region: float = 10.0
    tokens: float = 2.0


CODE = Published()
PAPER = Published(ce=1.0, fill=0.25 / 2, region=0.8, tokens=1.0)  # the mean over both profiles is half of their sum


def inside(name: str) -> np.ndarray:
    """Shape: [height, width] of the map grid, bool."""
    return cells(BOXES[name], CANVAS, GRID).numpy() > 0


def expected_loss(maps: Maps, constants: Published, *, gaussian: bool = True) -> float:
    """Equations 3 to 9."""
    total = 0.0
    for name, words in maps.words.items():
        region = inside(name)
        rows, columns = np.flatnonzero(region.any(axis=1)), np.flatnonzero(region.any(axis=0))
        best = int(constants.part * region.sum())
        u, v = np.linspace(-1, 1, len(rows)), np.linspace(-1, 1, len(columns))
        bell = np.exp(-(u[:, None] ** 2 + v[None, :] ** 2) / (2 * constants.spread**2))
        weight = np.zeros(GRID)
        weight[np.ix_(rows, columns)] = bell / bell.max() if gaussian else 1
        terms = []
        for word in words:
            for axis in (0, 1):
                word = convolve1d(word, constants.kernel, axis=axis, mode="mirror")
            strongest = np.sort((word * weight).ravel())[-best:].mean()
            profiles = [np.abs((word * region).max(axis=axis) - region.max(axis=axis)).mean() for axis in (0, 1)]
            terms.append(constants.ce * max(0.0, 1 - strongest) + constants.fill * sum(profiles))
        outward = np.sort(maps.looks[np.ix_(region.ravel(), ~region.ravel())].ravel())[-best:].mean()
        total += constants.tokens * float(np.mean(terms)) + constants.region * outward
    return total


def test_the_words_are_where_they_are_looked_for(trained):
    tokenizer = trained[0].tokenizer
    for name, text in TEXTS.items():
        ids = tokenizer(text).input_ids
        found = tokenizer.convert_ids_to_tokens([ids[position] for position in WORDS])
        assert found == [f"{TRIGGERS[name]}</w>", f"{name}</w>"]


@pytest.mark.parametrize(("settings", "constants", "gaussian"), [
    (LoraComposer.official(), CODE, True), (LoraComposer.paper(), PAPER, True),
    (LoraComposer(inject="attn2", gaussian=False, apart=0.0), CODE, False),
], ids=["official", "paper", "default without the bell"])  # fmt: skip
def test_the_loss_is_that_of_the_equations_on_the_maps_of_a_plain_model(
    trained, maps, open_maps, settings, constants, gaussian
):
    found = process_of(trained[0], Watched(replace(settings, reinit="off"))).losses
    assert found is not None
    expected = expected_loss(maps, constants, gaussian=gaussian)
    assert found.item() == pytest.approx(expected, rel=1e-4, abs=0)
    for name, value in {
        "kernel": (0.10650698, 0.78698604, 0.10650698), "part": 0.3, "ce": 1.1 * constants.ce,
        "fill": 1.1 * constants.fill, "region": 1.1 * constants.region, "tokens": 3 - constants.tokens,
        **({"spread": 0.5} if gaussian else {}),
    }.items():  # fmt: skip
        another = expected_loss(maps, replace(constants, **{name: value}), gaussian=gaussian)
        assert abs(another / expected - 1) > 1e-3, f"{name} would not be noticed"
    assert abs(expected_loss(open_maps, constants, gaussian=gaussian) / expected - 1) > 1e-3


def test_a_region_of_less_than_five_cells_is_judged_by_its_best_one(trained):
    """A fifth of its cells is none; the mean of none is not a number, and leaves no loss in the authors' code."""
    method = Watched(replace(LoraComposer.official(), reinit="off"))
    side, box = 2, (32, 32, 96, 96)  # in cells, in pixels
    trained[0](
        TEXTS["cat"], concepts=[Concept(name="cat", region=box)], method=method, num_inference_steps=1,
        guidance_scale=1.0, width=CANVAS[1], height=CANVAS[0], generator=seeded(), output_type="latent",
    )  # fmt: skip
    cell = GRID[1] + 1
    words = torch.full((1, 1, GRID[0] * GRID[1], 2), 0.25, requires_grad=True)
    looks = torch.zeros(1, GRID[0] * GRID[1], GRID[0] * GRID[1])
    looks[0, cell, 0] = 0.5  # out of the region
    loss = method.process.loss(AttentionMaps(words, looks))
    missing = 0.75 * (16 + 4 * side * (1 / GRID[0] + 1 / GRID[1]))
    assert loss.item() == pytest.approx(missing + 10 * 0.5, rel=1e-6)
    loss.sum().backward()
    assert words.grad is not None
    assert words.grad[0, 0, cell].abs().min() > 0


def windows(words: np.ndarray, region: np.ndarray) -> list[tuple[float, int, int]]:
    """The places to which a box can be moved, best first: how much attention to both words is there, top and left."""
    height, width = (len(np.flatnonzero(region.any(axis=axis))) for axis in (1, 0))
    score = words.sum(axis=0)
    places = [(y, x) for y in range(GRID[0] - height + 1) for x in range(GRID[1] - width + 1)]
    return sorted(((score[y : y + height, x : x + width].sum(), y, x) for y, x in places), reverse=True)


@pytest.mark.parametrize("mode", ["copy", "swap"])
def test_noise_comes_from_where_the_words_find_most_on_the_maps_of_a_plain_model(trained, maps, mode):
    method = Watched(replace(LoraComposer.official(), reinit=mode, step_size=0.0))
    process_of(trained[0], method)
    before, after = (latents[0].double().numpy() for latents in method.prepared[0])
    expected, taken = before.copy(), np.zeros(GRID, dtype=bool)
    moved = 0
    for name, words in maps.words.items():
        region = inside(name)
        top, left = np.argwhere(region)[0]
        height, width = np.argwhere(region)[-1] - (top, left) + 1
        free = [
            (y, x) for _, y, x in windows(words, region)
            if mode == "copy" or not taken[y : y + height, x : x + width].any()
        ]  # fmt: skip
        y, x = free[0]
        moved += (y, x) != (top, left)
        to, origin = (np.s_[:, 4 * a : 4 * (a + height), 4 * b : 4 * (b + width)] for a, b in ((top, left), (y, x)))
        if mode == "copy":
            expected[to] = before[origin]
        else:
            taken |= region
            taken[y : y + height, x : x + width] = True
            there = expected[origin].copy()
            assert not region[y : y + height, x : x + width].any(), "the exchange is written for places apart"
            expected[origin], expected[to] = expected[to], there
    assert moved
    if mode == "copy":
        expected = (expected - expected.mean()) / expected.std() * before.std() + before.mean()
    np.testing.assert_allclose(after, expected, atol=1e-5)


# The process, step by step

PROMPT = "a sks cat and a zwx dog on grass"
PHI = {0: 20.0, 1: 19.898, 25: 17.261}
"""Published step sizes at some of 50 steps."""


def load(pipe: Any, folder: Path) -> Any:
    """Loads the concepts "cat" and "dog"."""
    for seed, (name, trigger) in enumerate(TRIGGERS.items()):
        path = save_lora(folder / f"{name}-file.safetensors", unet=random_lora(pipe.unet, seed))
        pipe.load_concept(path, name, trigger=trigger, class_word=name)
    return pipe


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The concepts of a small pipeline."""
    return load(tiny_pipeline(), tmp_path_factory.mktemp("library")).library


@pytest.fixture
def composer(library) -> ComposeStableDiffusionPipeline:
    """A small pipeline with both concepts, for canvases of 64 x 64."""
    return with_library(tiny_pipeline(), library)


def side_by_side(width: int = 64, height: int = 64) -> list[Concept]:
    boxes = {"cat": (0, 0, width // 2, height), "dog": (width // 2, 8, width, height)}
    return [Concept(name=name, region=box) for name, box in boxes.items()]


def compose(pipe: Any, method: Any, prompt: str | list[str] = PROMPT, **arguments: Any) -> Any:
    given = {"concepts": side_by_side(), "num_inference_steps": 2, "width": 64, "height": 64, "guidance_scale": 1.0}
    return pipe(prompt, method=method, **{"output_type": "latent", "generator": seeded()} | given | arguments)


def rms(x: Tensor) -> Tensor:
    return x.square().mean(dim=(1, 2, 3)).sqrt()


def losses_of(process: Composing, latents: Tensor, step: Step) -> tuple[Tensor, AttentionMaps]:
    """The losses of a pass for maps alone, and the maps."""
    maps = process.session.denoiser.maps(latents, step, process.whole, process._request)
    return process.loss(maps), maps


def gradient_of(process: Composing, latents: Tensor, step: Step) -> Gradient:
    return process.session.denoiser.gradient(latents, step, process.whole, MapLoss(process._request, process.loss))


def at_the_first_step(pipe: Any, look: Look, settings: LoraComposer | None = None, **arguments: Any) -> None:
    """Looks at a process in its first step."""
    method = Watched(settings or LoraComposer(apart=0), once(look))
    compose(pipe, method, **arguments)
    assert method.processes


class Losses(Watched):
    """LoRA-Composer whose losses are observed before every step."""

    def __init__(self, settings: LoraComposer) -> None:
        super().__init__(settings, self._observe)
        self.losses: list[Tensor] = []

    def _observe(self, process: Composing, latents: Tensor, step: Step) -> None:
        if process.targets:
            self.losses.append(losses_of(process, latents, step)[0])

    def updates_of(self, image: int) -> list[int]:
        """The steps in which an image was updated."""
        return [step for step, move in enumerate(self.moves) if move[image].any()]


# The gradient


def test_the_gradient_is_the_slope_of_the_loss(tmp_path):
    def look(process: Composing, latents: Tensor, step: Step) -> None:
        found = gradient_of(process, latents, step)
        gradient = found.direction
        assert_close(found.losses, losses_of(process, latents, step)[0], 1e-6)
        for seed in range(3):
            along = gradient / rms(gradient)[:, None, None, None] + torch.randn(latents.shape, generator=seeded(seed))
            ahead, behind = (losses_of(process, latents + side * along, step)[0] for side in (1e-3, -1e-3))
            slope = (gradient * along).sum(dim=(1, 2, 3))
            torch.testing.assert_close((ahead - behind) / 2e-3, slope, rtol=0.01, atol=0)

    pipe = load(small_pipeline(), tmp_path)
    filled(pipe.text_encoder)
    at_the_first_step(pipe, look, num_images_per_prompt=2, width=128, height=128, concepts=side_by_side(128, 128))


def test_schedulers_that_scale_the_input_get_a_direction_in_the_scale_of_the_latents(composer):
    composer.scheduler = EulerDiscreteScheduler.from_config(composer.scheduler.config)

    def look(process: Composing, latents: Tensor, step: Step) -> None:
        direction = gradient_of(process, latents, step).direction
        with torch.enable_grad():
            moving = latents.detach().requires_grad_()
            loss, _ = losses_of(process, moving, step)
            (by_hand,) = torch.autograd.grad(loss.sum(), moving)
        scale_squared = composer.scheduler.sigmas[0] ** 2 + 1
        assert scale_squared > 100
        expected = scale_squared * by_hand
        assert ((direction - expected).abs().max() / expected.abs().max()) < 1e-4
        update = process.settings.step_size * direction / rms(direction)
        assert_close(process._update(latents, step), latents - update, 1e-5)

    at_the_first_step(composer, look, LoraComposer(apart=0, step_size=0.5))


def test_the_gradient_leaves_no_trace(composer):
    composer.unet.down_blocks[0].requires_grad_(False)
    before = State(composer)

    def look(process: Composing, latents: Tensor, step: Step) -> None:
        asking = [parameter.requires_grad for parameter in composer.unet.parameters()]
        found = gradient_of(process, latents, step)
        assert not found.losses.requires_grad
        assert not found.direction.requires_grad
        assert not latents.requires_grad
        assert found.losses.dtype == found.direction.dtype == torch.float32
        assert found.losses.shape == (1,)
        assert found.direction.shape == latents.shape
        assert [parameter.requires_grad for parameter in composer.unet.parameters()] == asking
        assert all(parameter.grad is None for parameter in composer.unet.parameters())

    at_the_first_step(composer, look)
    before.assert_unchanged()


def test_gradient_checkpointing_changes_nothing(composer):
    settings = LoraComposer(least_updates=1.0, most_updates=1.0)
    expected = compose(composer, settings).images
    composer.unet.enable_gradient_checkpointing()
    assert_close(compose(composer, settings).images, expected)


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
        assert all("pipe.model.enable_gradient_checkpointing(), or --save-memory gradient" in note for note in notes)


def test_a_gradient_that_is_not_finite_is_reported_with_its_step(composer):
    def spoil(pipe, step, timestep, tensors):
        return {"latents": tensors["latents"] * (math.nan if step == 1 else 1)}

    settings = LoraComposer(least_updates=1.0, most_updates=1.0)
    with pytest.raises(ValueError, match="the gradient at step 2 is not finite"):
        compose(composer, settings, num_inference_steps=4, callback_on_step_end=spoil)


# The loss


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_self_attention_is_recorded_only_for_the_loss_that_looks_at_it(composer, weight):
    def look(process: Composing, latents: Tensor, step: Step) -> None:
        assert (losses_of(process, latents, step)[1].cells is not None) == (weight > 0)

    at_the_first_step(composer, look, LoraComposer(apart=0, region_weight=weight))


@pytest.mark.parametrize("changes", [
    {"step_size": 0}, {"ce_weight": 0, "fill_weight": 0, "region_weight": 0}, {"most_updates": 0, "least_updates": 1},
    {"inject": "off", "reinit": "copy"},
], ids=["no step", "no loss", "no time", "nothing read"])  # fmt: skip
def test_without_anything_to_gain_there_is_no_pass_for_it(composer, changes):
    cost = compose(composer, LoraComposer(apart=0, **changes), num_inference_steps=3).cost
    assert (cost.rows_forward, cost.rows_stopped, cost.rows_backward) == (3, 0, 0)


# When and how far


@pytest.mark.parametrize(("rule", "decay", "sizes"), [
    ("raw", 0.5, PHI), ("rms", 1.0, {0: 20.0, 1: 20 - 10 / 49, 25: 20 - 250 / 49}),
], ids=["code", "paper"])  # fmt: skip
def test_step_sizes_fall_as_published(composer, rule, decay, sizes):
    factor = 1 if rule == "raw" else 0.01  # of the published size: gradients of a small model are small

    def look(process: Composing, latents: Tensor, step: Step) -> None:
        gradient = gradient_of(process, latents, step).direction
        expected = gradient if rule == "raw" else gradient / rms(gradient)
        for index, size in sizes.items():
            move = process._update(latents, replace(step, index=index, count=50)) - latents
            found = (move * expected).sum() / expected.square().sum()
            assert found.item() == pytest.approx(-size * factor, rel=2e-4)
            assert_close(move, found * expected)

    settings = LoraComposer(step_rule=rule, step_size=20 * factor, step_decay=decay, least_updates=0.5, apart=0)
    at_the_first_step(composer, look, settings, num_inference_steps=1)


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


def check_schedule(method: Losses, images: int, steps: int) -> list[int]:
    """The number of updates of every image, checked against the losses."""
    counts, settings = [], method.settings
    assert isinstance(settings, LoraComposer)
    for image in range(images):
        updated = method.updates_of(image)
        losses = [loss[image].item() for loss in method.losses]
        assert updated == list(range(expected_updates(losses, steps, settings.least_updates, settings.most_updates)))
        counts.append(len(updated))
    return counts


@pytest.mark.slow
def test_the_official_schedule_updates_6_to_26_of_50_steps(composer):
    method = Losses(LoraComposer.official())
    compose(composer, method, num_inference_steps=50, num_images_per_prompt=4)
    counts = check_schedule(method, 4, 50)
    assert all(6 <= count <= 26 for count in counts)
    assert min(counts) < 26, "an image whose loss rises is to be among them"
    loaded = composer.resolve_concepts(side_by_side())
    counted = count_run(composer, LoraComposer.official(), loaded, 50, 7.5, 64, 64)
    assert (counted.rows_forward, counted.rows_backward) == (100, 26)


@pytest.mark.parametrize(("least", "most", "fewest", "largest"), [
    (1.0, 0.0, 0, 0), (0.0, 1.0, 2, 6), pytest.param(0.5, 0.5, 4, 4, marks=pytest.mark.slow), (0.25, 0.55, 3, 4),
])  # fmt: skip
def test_updates_lie_between_the_fewest_and_the_most(composer, least, most, fewest, largest):
    method = Losses(LoraComposer(least_updates=least, most_updates=most, apart=0, step_size=0.3))
    cost = compose(composer, method, num_inference_steps=6, num_images_per_prompt=3).cost
    counts = check_schedule(method, 3, 6)
    assert all(fewest <= count <= largest for count in counts)
    assert cost.rows_backward == 3 * max(counts)


def test_latents_are_updated_only_where_the_scheduler_goes_on_from_them(composer):
    """A second pass of a step goes back to the latents of the first one."""
    composer.scheduler = HeunDiscreteScheduler.from_config(composer.scheduler.config)
    method = LoraComposer(least_updates=1.0, most_updates=1.0, apart=0)
    output = compose(composer, method)
    assert output.images.isfinite().all()
    assert (output.cost.rows_forward, output.cost.rows_backward) == (3, 2)
    loaded = composer.resolve_concepts(side_by_side())
    assert count_run(composer, method, loaded, 2, 1.0, 64, 64).rows_backward == 2


# Images are independent


def test_images_of_a_batch_equal_single_images_also_where_they_stop(composer):
    filled(composer.text_encoder)
    settings = LoraComposer(least_updates=0.0, most_updates=1.0, apart=0.3, step_size=0.3, reinit="swap", rows="all")
    prompts = [PROMPT, "the zwx by the sks cat in the water"]
    arguments = {"num_inference_steps": 6, "guidance_scale": 4.0}
    method = Losses(settings)
    generators = [seeded(seed) for seed in range(4)]
    together = compose(composer, method, prompts, num_images_per_prompt=2, generator=generators, **arguments).images
    stops = check_schedule(method, 4, 6)
    assert len(set(stops)) > 1, "images are to stop at different steps"
    for row in (0, 3):  # one of each prompt
        alone = Losses(settings)
        one = compose(composer, alone, prompts[row // 2], generator=seeded(row), **arguments).images
        assert check_schedule(alone, 1, 6) == [stops[row]]
        assert_close(together[row], one[0], 1e-3)


def test_a_second_call_gives_the_bits_of_a_new_pipeline(composer, tmp_path):
    settings = LoraComposer(reinit="swap")
    arguments: dict[str, Any] = {"guidance_scale": 4.0}
    compose(composer, settings, "zwx dog and sks cat", width=128, height=64, generator=seeded(5))
    second, third = (compose(composer, settings, **arguments).images for _ in range(2))
    fresh = compose(load(tiny_pipeline(), tmp_path), settings, **arguments).images
    assert torch.equal(second, fresh)
    assert torch.equal(third, fresh)
    assert not torch.equal(compose(composer, settings, generator=seeded(1), **arguments).images, fresh)
