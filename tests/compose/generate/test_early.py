"""What can be judged without a model is judged before it is opened."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from commands import call
from lora_compose.compose.generate import images
from lora_compose.compose.generate.early import check_early
from lora_compose.compose.playground.assets import playground_lora
from lora_compose.pipelines.scene.scene import Concept, Run, Scene
from small_world import SIZE

CAT = ("--lora", "playground:cat")


@pytest.fixture(autouse=True)
def _opens_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was opened")

    monkeypatch.setattr(images, "open_model", refuse)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((*CAT, "--prompt", "a cat"), "the trigger 'sks' of concept 'cat' is not in the prompt 'a cat'"),
        ((*CAT, "--prompt", "a sks cat", "--box", "0,0,64,1280"), f"leaves the canvas of {SIZE} x {SIZE} pixels"),
        ((*CAT, "--prompt", "a sks cat", "--set", "length=1"), "--set length: a setting needs --method"),
        ((*CAT, "--prompt", "a sks cat", "--method", "draft", "--set", "lenght=1"), "did you mean 'length'?"),
        (("--lora", "cut.safetensors", "--prompt", "a"), "cut.safetensors is not a readable safetensors file"),
        (("--lora", "it.gguf", "--prompt", "a"), "it.gguf is GGUF, the format of quantised models"),
        (("--lora", "it.pt", "--prompt", "a"), "it.pt is a pickle"),
    ],
)
def test_a_run_that_cannot_be_made_is_refused_before_its_model_is_opened(
    options: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cut.safetensors").write_bytes(playground_lora("cat").read_bytes()[:500])
    for name in ("it.gguf", "it.pt"):
        Path(name).write_bytes(b"GGUF")
    assert message in call("run", "playground", *options, "--out", "out", code=2).output


def test_a_run_that_can_be_made_passes() -> None:
    concepts = (
        Concept(name="cat", lora="playground:cat", region=(0, 0, 64, 128)),
        Concept(name="ink", lora="user/ink", role="style"),
        Concept(name="dog", lora="playground:dog", prompt="a zwx dog", region=(0.5, 0.0, 1.0, 1.0)),
    )
    check_early(Run(scene=Scene(prompt="a (sks:1.2) cat and a dog", concepts=concepts), model="playground"))


def test_commands_that_read_evaluations_name_the_packages_that_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = sys.modules["lora_compose.compose.support.packages"].importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "scipy" else found(name, *rest))
    for command in (
        ["blind", "from", tmp_path, "--method", "merge"],
        ["evaluate", "failures", tmp_path, "--method", "a"],
    ):
        told = call(*command, code=2).output
        assert re.search(r"needs scipy: pip install 'lora-compose\[evaluation\]'", told)
