"""The suite that compares kinds of prior preservation has each method with LoRAs of each kind."""

from pathlib import Path

import yaml

from lora_compose.compose.evaluation.suite import Suite
from lora_compose.compose.playground.assets import assets_dir
from recipe.loras import Preserve
from recipe.preservation import METHODS, compared


def test_every_method_is_run_with_loras_of_every_kind(tmp_path: Path) -> None:
    text = (assets_dir() / "suites" / "playground-quick.yaml").read_text("utf-8")
    suite = Suite.model_validate(compared(yaml.safe_load(text), tmp_path, "elsewhere"))
    assert {(arm.method, arm.lora) for arm in suite.methods} == {(one, kind) for one in METHODS for kind in Preserve}
    assert suite.model == "elsewhere"
    for concept in suite.concepts:
        assert concept.loras == {kind: str(tmp_path / kind / f"{concept.name}.safetensors") for kind in Preserve}
