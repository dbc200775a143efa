"""Sizes that cannot fit into memory are refused before anything is done, and no size that fits."""

import time

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock

from components import sd_unet, sdxl_unet
from composing import compose, composer_of
from flux import flux_transformer
from lora_compose.attention import backbone_of
from lora_compose.compose.benchmark.memory import added_memory
from lora_compose.compose.generate.making import make, plan
from lora_compose.pipelines.calls.memory import check_size, least_bytes, memory_of, warn_of_size
from lora_compose.pipelines.scene.scene import Run, Scene
from lora_compose.pipelines.support.notes import kept
from small_world import SIZE


@pytest.fixture
def composer():
    return composer_of("sd")


@pytest.mark.parametrize("method", ["merge", "composite"])
def test_a_size_that_needs_more_than_all_memory_is_refused_before_anything_is_done(composer, method):
    began = time.process_time()
    with pytest.raises(ValueError, match=r"100000 x 100000 pixels cannot be made: .* GiB, and the memory of cpu is"):
        compose(composer, width=100_000, height=100_000, method=method, num_images_per_prompt=100)
    assert time.process_time() - began < 1


@pytest.mark.parametrize("concepts", [True, False])
def test_scenes_are_judged_with_and_without_concepts(playground, concepts):
    scene = Scene(prompt="a cat", width=1_000_000, height=1_000_000)
    run = Run(scene=scene, model="playground", steps=1)
    for judge in (plan, make):
        with pytest.raises(ValueError, match="1000000 x 1000000 pixels cannot be made"):
            judge(playground, run)


@pytest.mark.parametrize(
    ("share", "times"),
    [(100, "10,000 times"), (8, "64 times"), (2, "4 times"), (1, None), (0.5, None), (1 / 8, "0.0156")],
)
def test_a_size_far_from_the_models_own_warns(playground, share, times):
    side = round(share * SIZE)
    with kept() as notes:
        warn_of_size(playground, side, side)
    assert bool(notes) is (times is not None)
    assert times is None or (f"are {times}" in notes[0] and f"made for ({SIZE} x {SIZE})" in notes[0])


def unet_pass(unet, side):
    text = torch.zeros(1, 7, unet.config.cross_attention_dim)
    size = {"text_embeds": torch.zeros(1, 12), "time_ids": torch.zeros(1, 6)}
    unet(torch.zeros(1, 4, side, side), 500, text, added_cond_kwargs=size)


def flux_pass(transformer, side):
    cells = (side // 2) ** 2
    transformer(
        torch.zeros(1, cells, transformer.config.in_channels), torch.zeros(1, 7, 24), torch.zeros(1, 24),
        torch.ones(1), torch.zeros(cells, 3), torch.zeros(7, 3), torch.ones(1),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("model", "forward"),
    [(sd_unet, unet_pass), pytest.param(sdxl_unet, unet_pass, marks=pytest.mark.slow), (flux_transformer, flux_pass)],
)
@torch.no_grad()
def test_what_is_needed_at_least_is_less_than_what_is_used(model, forward):
    one, side = model(), 64
    with added_memory("cpu", one.parameters()) as memory:
        before = memory.peak_bytes
        forward(one, side)
    used = memory.peak_bytes - before
    assert used / 20 < least_bytes(backbone_of(one), (side, side)) < used


def test_it_grows_with_the_cells_and_halves_with_the_precision():
    unet = sd_unet()
    small, large = (least_bytes(backbone_of(unet), (side, side)) for side in (64, 128))
    assert large == 4 * small
    assert least_bytes(backbone_of(unet.half()), (64, 64)) == small // 2


def test_feed_forward_layers_that_run_piece_by_piece_do_not_count():
    unet = sd_unet()
    whole = least_bytes(backbone_of(unet), (64, 64))
    for module in unet.modules():
        if isinstance(module, BasicTransformerBlock):
            module.set_chunk_feed_forward(1, 1)
    assert least_bytes(backbone_of(unet), (64, 64)) < whole


def test_the_memory_of_the_host_is_known_and_that_of_other_devices_may_not_be(composer):
    assert 2**30 < (memory_of(torch.device("cpu")) or 0) < 2**50
    assert memory_of(torch.device("meta")) is None
    check_size(backbone_of(composer.model), 8, composer.runs_on, 4096, 4096)
