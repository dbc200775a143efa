"""What CLoRA needs in memory: one graph at a time, of all branches or of one."""

import gc
from dataclasses import replace
from typing import Any

from components import random_lora, tiny_pipeline
from lora_compose.compose.benchmark.memory import peak_memory
from lora_compose.pipelines.methods import Clora

TRIGGERS = {"sks": "cat", "zwx": "dog", "xlo": "bear", "ohwx": "rabbit"}
PROMPT = ", ".join(f"{trigger} {noun}" for trigger, noun in TRIGGERS.items())
OURS = Clora(step_size=0.05, update_until=1.0)


def peak_of(write_lora: Any, concepts: int, method: Clora, steps: int = 2) -> int:
    """The most bytes that tensors take during a call, without those of other tests."""
    gc.collect()
    with peak_memory("cpu") as memory:
        others = memory.peak_bytes
    pipe = tiny_pipeline()
    for seed, (trigger, noun) in enumerate(list(TRIGGERS.items())[:concepts]):
        file = write_lora(trigger, unet=random_lora(pipe.unet, seed))
        pipe.load_concept(file, name=trigger, trigger=trigger, class_word=noun)
    call = {"prompt": PROMPT, "concepts": list(TRIGGERS)[:concepts], "method": method, "output_type": "latent"}
    with peak_memory("cpu") as memory:
        pipe(**call, num_inference_steps=steps)
    return memory.peak_bytes - others


def test_the_peak_does_not_grow_with_steps_or_refinement(write_lora):
    few = peak_of(write_lora, 2, OURS)
    assert peak_of(write_lora, 2, OURS, steps=5) <= few * 1.001
    refined = replace(OURS, refine_at=(0.0,), refinements=5)
    assert peak_of(write_lora, 2, refined) <= few * 1.001


def test_updates_need_less_than_those_of_the_authors(write_lora):
    official = replace(Clora.official(), refine_at=())
    assert peak_of(write_lora, 2, OURS) < 0.7 * peak_of(write_lora, 2, official)


def test_one_branch_at_a_time_needs_less_and_hardly_grows_with_concepts(write_lora):
    one_by_one = replace(OURS, branch_batch_size=1)
    two, four = (peak_of(write_lora, number, one_by_one) for number in (2, 4))
    together = peak_of(write_lora, 4, OURS)
    assert four < 0.8 * together
    assert four < 1.2 * two
