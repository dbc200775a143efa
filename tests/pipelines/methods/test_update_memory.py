"""What updates of the latents need in memory: one graph at a time, of all branches or of one."""

from dataclasses import replace
from typing import Any

import pytest

from components import random_lora, tiny_pipeline
from lora_compose.compose.benchmark.memory import added_memory
from lora_compose.pipelines.methods import Clora, LoraComposer, Settings
from lora_compose.pipelines.scene.scene import Concept

WORDS = {"sks": "cat", "zwx": "dog", "xlo": "bear", "ohwx": "rabbit"}
PROMPT = ", ".join(f"{trigger} {word}" for trigger, word in WORDS.items())
CLORA = Clora(step_size=0.05, update_until=1.0)
COMPOSER = LoraComposer.official()
IN_ALL_STEPS = replace(COMPOSER, least_updates=1.0, most_updates=1.0)


def peak_of(write_lora: Any, concepts: int, method: Settings, steps: int = 1) -> int:
    """The most bytes that tensors take during a call."""
    pipe, width, scene = tiny_pipeline(), 128 // concepts, []
    for i, (trigger, word) in enumerate(list(WORDS.items())[:concepts]):
        pipe.load_concept(
            write_lora(trigger, unet=random_lora(pipe.unet, i)), trigger, trigger=trigger, class_word=word
        )
        scene.append(Concept(name=trigger, region=(width * i, 0, width * (i + 1), 128)))
    with added_memory("cpu", pipe.unet.parameters()) as memory:
        pipe(PROMPT, concepts=scene, method=method, output_type="latent", num_inference_steps=steps)
    return memory.peak_bytes


@pytest.mark.parametrize("method", [CLORA, pytest.param(IN_ALL_STEPS, marks=pytest.mark.slow)])
def test_the_peak_does_not_grow_with_the_number_of_updates(write_lora, method):
    few = peak_of(write_lora, 2, method, steps=2)
    assert peak_of(write_lora, 2, method, steps=3) <= few * 1.001
    if isinstance(method, Clora):
        assert peak_of(write_lora, 2, replace(method, refine_at=(0.0,), refinements=2)) <= few * 1.001


@pytest.mark.slow
def test_memory_grows_in_step_with_the_number_of_regions(write_lora):
    """By factors, gates, keys and values, and the maps that losses look at; nothing is kept for pairs of concepts."""
    one, two, four = (peak_of(write_lora, number, COMPOSER) for number in (1, 2, 4))
    assert four - two < 2 * 1.3 * (two - one)
    assert four < 1.6 * one


def test_updates_of_clora_need_less_than_those_of_the_authors(write_lora):
    official = replace(Clora.official(), refine_at=())
    assert peak_of(write_lora, 2, CLORA) < 0.7 * peak_of(write_lora, 2, official)


@pytest.mark.slow
def test_one_branch_at_a_time_needs_less_and_hardly_grows_with_concepts(write_lora):
    one_by_one = replace(CLORA, branch_batch_size=1)
    two, four = (peak_of(write_lora, number, one_by_one) for number in (2, 4))
    assert four < 0.8 * peak_of(write_lora, 4, CLORA)
    assert four < 1.2 * two
