"""What LoRA-Composer needs in memory: one graph at a time, and for every further concept its factors and text."""

from typing import Any

from components import random_lora, tiny_pipeline
from lora_compose.compose.benchmark.memory import peak_memory
from lora_compose.pipelines.methods import LoraComposer
from lora_compose.pipelines.scene import Concept

TRIGGERS = ("sks", "zwx", "xlo", "ohwx")
OFFICIAL = LoraComposer.official()


def peak_of(write_lora: Any, concepts: int, method: LoraComposer, steps: int = 2) -> int:
    """The most bytes that tensors take during a call."""
    pipe = tiny_pipeline()
    for seed, trigger in enumerate(TRIGGERS[:concepts]):
        pipe.load_concept(write_lora(trigger, unet=random_lora(pipe.unet, seed)), name=trigger, trigger=trigger)
    width = 128 // concepts
    boxed = [
        Concept(name=name, region=(width * i, 0, width * (i + 1), 128)) for i, name in enumerate(TRIGGERS[:concepts])
    ]
    call = {"prompt": " ".join(TRIGGERS), "concepts": boxed, "method": method, "output_type": "latent"}
    with peak_memory("cpu") as memory:
        pipe(**call, num_inference_steps=steps, width=128, height=128)
    return memory.peak_bytes


def test_the_peak_does_not_grow_with_the_number_of_updates(write_lora):
    all_steps = LoraComposer(**{**vars(OFFICIAL), "least_updates": 1.0, "most_updates": 1.0})
    few = peak_of(write_lora, 2, all_steps, steps=2)
    many = peak_of(write_lora, 2, all_steps, steps=6)
    assert many <= few * 1.001


def test_a_graph_is_what_updates_add(write_lora):
    with_updates = peak_of(write_lora, 2, OFFICIAL)
    without = peak_of(write_lora, 2, LoraComposer(**{**vars(OFFICIAL), "step_size": 0.0}))
    assert with_updates > without


def test_memory_grows_in_step_with_the_number_of_concepts(write_lora):
    """By factors, gates, keys and values, and the maps that losses look at; nothing is kept for pairs of concepts."""
    one, two, four = (peak_of(write_lora, number, OFFICIAL) for number in (1, 2, 4))
    assert four - two < 2 * 1.3 * (two - one)
    assert four < 1.6 * one
