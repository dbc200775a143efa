"""The suite that compares kinds of prior preservation has each method with LoRAs of each kind."""

from pathlib import Path

import pytest
import yaml

from lora_compose.compose.evaluation.suite import Suite
from lora_compose.compose.playground.assets import assets_dir
from recipe.loras import Preserve
from recipe.preservation import GROUNDS, METHODS, compared


def test_every_pair_of_trained_concepts_is_made_by_every_method_with_loras_of_every_kind(tmp_path: Path) -> None:
    shipped = yaml.safe_load((assets_dir() / "suites" / "playground-quick.yaml").read_text("utf-8"))
    for kind in Preserve:
        (tmp_path / kind).mkdir()
        for name in ("cat", "dog", *(["mira"] if kind is Preserve.NONE else [])):
            (tmp_path / kind / f"{name}.safetensors").touch()
    suite = Suite.model_validate(compared(shipped, tmp_path, "elsewhere"))
    assert {(arm.method, arm.lora) for arm in suite.methods} == {(one, kind) for one in METHODS for kind in Preserve}
    assert suite.model == "elsewhere"
    assert [concept.name for concept in suite.concepts] == ["cat", "dog"]
    for concept in suite.concepts:
        assert concept.loras == {kind: str(tmp_path / kind / f"{concept.name}.safetensors") for kind in Preserve}
    pairs, beside = suite.scenes[: len(GROUNDS)], suite.scenes[len(GROUNDS) :]
    assert [scene.prompt for scene in pairs] == [f"a sks cat and a zwx dog {ground}" for ground in GROUNDS]
    assert [scene.prompt for scene in beside] == [
        f"a {phrase} {ground}" for phrase in ("sks cat and a cat", "zwx dog and a dog") for ground in GROUNDS[:2]
    ]
    assert [(scene.concepts, dict(scene.bystanders)) for scene in beside[::2]] == [
        (("cat",), {"plain cat": "cat"}),
        (("dog",), {"plain dog": "dog"}),
    ]


def test_one_concept_alone_is_refused(tmp_path: Path) -> None:
    shipped = yaml.safe_load((assets_dir() / "suites" / "playground-quick.yaml").read_text("utf-8"))
    with pytest.raises(ValueError, match="LoRAs of at least two concepts"):
        compared(shipped, tmp_path, None)
