"""What is kept of a run is found again wherever its files lie, and not if a file has another content."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lora_compose.compose.generate.facts import digest, run_facts
from lora_compose.pipelines.scene.scene import Concept, Run, Scene

GUIDES = {
    "controls": {},
    "ip_adapters": {"weight_name": "adapter.safetensors"},
}


@pytest.mark.parametrize("field", GUIDES)
def test_models_and_images_that_guide_a_scene_count_by_content(tmp_path: Path, field: str) -> None:
    def facts(folder: str, colour: str, weights: bytes) -> str:
        path = tmp_path / folder
        path.mkdir()
        Image.new("RGB", (8, 8), colour).save(path / "guide.png")
        (path / "adapter.safetensors").write_bytes(weights)
        guide: dict[str, Any] = {"model": str(path), "image": str(path / "guide.png"), **GUIDES[field]}
        scene = Scene.model_validate({"prompt": "a cat", field: [guide]})
        return digest(run_facts(Run(scene=scene, model="playground"), [0], 1, ()))

    first = facts("here", "red", b"1")
    assert facts("there", "red", b"1") == first
    assert facts("other image", "blue", b"1") != first
    assert facts("other weights", "red", b"2") != first


def test_a_bystander_has_no_file_and_counts_by_its_class_word() -> None:
    def facts(*concepts: Concept) -> str:
        run = Run(scene=Scene(prompt="a cat and a dog", concepts=concepts), model="playground", method="draft")
        return digest(run_facts(run, [0], 1, ()))

    cat, dog = (Concept(name="other", role="bystander", class_word=word) for word in ("cat", "dog"))
    assert len({facts(), facts(cat), facts(dog)}) == 3


def test_a_file_that_has_changed_since_counts_as_it_is_now(tmp_path: Path) -> None:
    """A program may train a LoRA again and make the images of a batch again."""
    lora = tmp_path / "cat.safetensors"
    scene = Scene(prompt="a sks cat", concepts=(Concept(name="cat", lora=str(lora)),))

    def facts(weights: bytes) -> str:
        lora.write_bytes(weights)
        return digest(run_facts(Run(scene=scene, model="playground"), [0], 1, ()))

    assert facts(b"1") != facts(b"one more")
