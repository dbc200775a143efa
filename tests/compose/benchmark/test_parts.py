"""The work of the host for a call, by part."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from components import random_lora, tiny_pipeline
from lora_compose.compose.benchmark.host import operations, python_calls
from lora_compose.compose.benchmark.parts import PARTS, split
from lora_compose.pipelines.scene.scene import Concept


def test_parts_of_a_call_add_up_to_it_and_each_has_what_is_done_there(write_lora: Callable[..., Path]) -> None:
    pipe = tiny_pipeline()
    for seed, name in enumerate(("cat", "dog")):
        pipe.load_concept(write_lora(name, unet=random_lora(pipe.unet, seed)), name, trigger=name)
    concepts = [Concept(name="cat", region=(0, 0, 16, 32)), Concept(name="dog", region=(16, 0, 32, 32))]

    def call() -> Any:
        return pipe(
            "a cat and a dog", concepts=concepts, method="regional", num_inference_steps=1, width=32, height=32,
            output_type="np",
        )  # fmt: skip

    found = split(pipe, call)
    assert tuple(found.again) == tuple(found.new) == PARTS
    calls = sum(work.python_calls for work in found.again.values())
    assert abs(calls - python_calls(call)) < 20  # the tracker's own
    assert sum(work.operations for work in found.again.values()) == operations(call)
    assert all(work.python_calls for work in found.again.values())
    assert found.new["bank"].python_calls > found.again["bank"].python_calls
    assert found.new["bank"].operations > found.again["bank"].operations == 0
    assert found.new["passes"].operations == found.again["passes"].operations
    assert abs(found.new["passes"].python_calls - found.again["passes"].python_calls) < 20  # garbage is collected there
    assert found.again["prompts"].operations > 0
    assert found.again["decoding"].operations > 0
