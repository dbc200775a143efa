"""What LoRA-Composer makes of attention maps, against its formulas on maps that a plain model gives.

Yang et al., "LoRA-Composer", arXiv 2403.11627, sections 3.3 to 3.5. Queries and keys are taken from diffusers' own UNet
with dense LoRAs; everything after them is in double precision, with the published constants written out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from lora_compose.pipelines.engine import Engine
from safetensors.torch import save_file
from scipy.ndimage import convolve1d
from torch import Tensor

from components import ATTENTION, random_lora, seeded, small_pipeline
from lora_compose.attention import Lora
from lora_compose.pipelines.methods.lora_composer import Composing, LoraComposer
from lora_compose.pipelines.scene import Concept
from reference import WrittenOut, cells

CANVAS = (256, 384)
BOXES = {"cat": (32, 32, 128, 160), "dog": (192, 64, 352, 160)}
"""Unequal, with background between them: 4 x 3 and 3 x 5 cells of the map grid."""

GRID = (8, 12)

TRIGGERS = {"cat": "sks", "dog": "zwx"}
TEXTS = {"cat": "a sks cat on grass", "dog": "one zwx dog at night"}
WORDS = (2, 3)
"""The tokens of trigger and class word in both texts, after the start token and one word."""

MAP_LAYERS = tuple(
    f"{block}.attentions.{i}.transformer_blocks.0"
    for block, layers in (("down_blocks.2", 2), ("up_blocks.1", 3))
    for i in range(layers)
)
"""The blocks on the grid of 1/32 of the picture."""


SHARPER = 30


@dataclass(frozen=True)
class Seen(LoraComposer):
    """LoRA-Composer whose process, and what it does before the first step, can be looked at after a call."""

    processes: list[Composing] = field(default_factory=list)
    starts: list[Tensor] = field(default_factory=list)

    def start(self, engine: Engine) -> Any:
        process: Any = super().start(engine)
        self.processes.append(process)
        return Starting(self, self.processes[-1])


@dataclass
class Starting:
    seen: Seen
    process: Composing

    def prepare(self, latents: Tensor) -> Tensor:
        self.seen.starts.extend([latents, self.process.prepare(latents)])
        return self.seen.starts[-1]

    def step(self, latents: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.process.step(latents, t)


@dataclass(frozen=True)
class Maps:
    """Mean over layers and heads, in double precision.

    words: attention of all cells to the words of each concept's own text. Shape: [words, height, width] each.
    looks: attention of cells to each other, isolated. Shape: [cells, cells].
    """

    words: Mapping[str, np.ndarray]
    looks: np.ndarray


@pytest.fixture(scope="module")
def composed(tmp_path_factory: Any) -> tuple[Any, Any, dict[str, Lora]]:
    """A composing pipeline, diffusers' own with the same weights, and the LoRAs of both concepts."""
    pipe, plain = small_pipeline(), small_pipeline(StableDiffusionPipeline)
    for each in (pipe, plain):
        each.set_progress_bar_config(disable=True)
        for name, parameter in each.unet.named_parameters():
            if name.endswith("to_q.weight"):  # attention of random weights is almost the same everywhere
                parameter.data *= SHARPER
    loras = {name: random_lora(pipe.unet, seed, targets=ATTENTION) for seed, name in enumerate(BOXES)}
    for name, lora in loras.items():
        tensors = {}
        for layer, factors in lora.items():
            tensors[f"unet.{layer}.lora_A.weight"], tensors[f"unet.{layer}.lora_B.weight"] = factors.down, factors.up
        path = tmp_path_factory.mktemp("loras") / f"{name}.safetensors"
        save_file(tensors, path, metadata={"format": "pt"})
        pipe.load_concept(path, name, trigger=TRIGGERS[name], class_word=name)
    return pipe, plain, loras


def compose(pipe: Any, method: LoraComposer) -> None:
    concepts = [Concept(name=name, region=box, prompt=TEXTS[name]) for name, box in BOXES.items()]
    pipe(
        "on grass", concepts=concepts, method=method, num_inference_steps=1, guidance_scale=1.0, width=CANVAS[1],
        height=CANVAS[0], generator=seeded(), output_type="latent",
    )  # fmt: skip


@torch.no_grad()
def plain_maps(plain: Any, loras: Mapping[str, Lora], isolate: bool = True) -> Maps:
    """The maps of the first pass with injection into attn2, from a model that knows nothing of composing."""
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
    plain.unet(latents, plain.scheduler.timesteps[0], encoded[0])
    cross, own = (
        np.mean(
            [torch.stack(written[f"{layer}.{part}.processor"].seen).numpy() for layer in MAP_LAYERS], axis=(0, 2, 3)
        )
        for part in ("attn2", "attn1")
    )  # over layers, the only row, and heads
    words = {name: cross[1 + n][:, list(WORDS)].T.reshape(2, *GRID) for n, name in enumerate(BOXES)}
    return Maps(words, own[0])


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


def test_the_words_are_where_they_are_looked_for(composed):
    tokenizer = composed[0].tokenizer
    for name, text in TEXTS.items():
        ids = tokenizer(text).input_ids
        assert tokenizer.decode([ids[position] for position in WORDS]).split() == [TRIGGERS[name], name]


@pytest.mark.parametrize(("settings", "constants", "gaussian"), [
    (LoraComposer.official(), CODE, True), (LoraComposer.paper(), PAPER, True),
    (LoraComposer(inject="attn2", gaussian=False), CODE, False),
], ids=["official", "paper", "default without the bell"])  # fmt: skip
def test_the_loss_is_that_of_the_equations_on_the_maps_of_a_plain_model(composed, settings, constants, gaussian):
    pipe, plain, loras = composed
    method = Seen(**vars(settings) | {"reinit": "off"})
    compose(pipe, method)
    (found,) = (process.losses for process in method.processes)
    assert found is not None
    maps = plain_maps(plain, loras)
    expected = expected_loss(maps, constants, gaussian=gaussian)
    assert found.item() == pytest.approx(expected, rel=1e-4, abs=0)
    for name, value in {
        "kernel": (0.10650698, 0.78698604, 0.10650698), "part": 0.3, "ce": 1.1 * constants.ce,
        "fill": 1.1 * constants.fill, "region": 1.1 * constants.region, "tokens": 3 - constants.tokens,
        **({"spread": 0.5} if gaussian else {}),
    }.items():  # fmt: skip
        another = expected_loss(maps, replace(constants, **{name: value}), gaussian=gaussian)
        assert abs(another / expected - 1) > 1e-3, f"{name} would not be noticed"
    open_maps = plain_maps(plain, loras, isolate=False)
    assert abs(expected_loss(open_maps, constants, gaussian=gaussian) / expected - 1) > 1e-3


def test_without_any_attention_the_loss_is_that_of_empty_boxes(composed):
    method = Seen(**vars(LoraComposer.official()))
    compose(composed[0], method)
    (process,) = method.processes
    recorder = process._recorder()
    recorder.maps = {"layer": torch.zeros(len(BOXES), 1, GRID[0] * GRID[1], 2)}
    recorder.self_maps = {"layer": torch.zeros(1, GRID[0] * GRID[1], GRID[0] * GRID[1])}
    expected = sum(
        2 * (8 + 2 * (columns / GRID[1] + rows / GRID[0]))
        for rows, columns in [(4, 3), (3, 5)]  # of the boxes
    )
    assert process.loss(recorder).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("side", [1, 2])
def test_a_region_of_less_than_five_cells_is_judged_by_its_best_one(composed, side):
    """A fifth of its cells is none; the mean of none is not a number, and leaves no loss in the authors' code."""
    method = replace(Seen(**vars(LoraComposer.official())), reinit="off")
    box = (32, 32, 32 + 32 * side, 32 + 32 * side)
    composed[0](
        TEXTS["cat"], concepts=[Concept(name="cat", region=box)], method=method, num_inference_steps=1,
        guidance_scale=1.0, width=CANVAS[1], height=CANVAS[0], generator=seeded(), output_type="latent",
    )  # fmt: skip
    (process,) = method.processes
    recorder, cell = process._recorder(), GRID[1] + 1
    words = torch.full((1, 1, GRID[0] * GRID[1], 2), 0.25, requires_grad=True)
    looks = torch.zeros(1, GRID[0] * GRID[1], GRID[0] * GRID[1])
    looks[0, cell, 0] = 0.5  # out of the region
    recorder.maps, recorder.self_maps = {"layer": words}, {"layer": looks}
    loss = process.loss(recorder)
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
def test_noise_comes_from_where_the_words_find_most_on_the_maps_of_a_plain_model(composed, mode):
    pipe, plain, loras = composed
    method = Seen(**vars(LoraComposer.official()) | {"reinit": mode, "step_size": 0.0})
    compose(pipe, method)
    before, after = (latents[0].double().numpy() for latents in method.starts)
    expected, taken = before.copy(), np.zeros(GRID, dtype=bool)
    moved = 0
    for name, words in plain_maps(plain, loras).words.items():
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
