"""A method is one file and a line in the registries, as CONTRIBUTING.md says."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import call
from components import EVERYTHING, random_lora, seeded
from guides import left_out
from lora_compose.compose.commands import methods
from lora_compose.compose.generate import method_list
from lora_compose.compose.support import names
from lora_compose.pipelines.methods import METHODS, make_method, name_of

YOUR_METHOD = '''
"""Fading: every LoRA acts everywhere, with a part of its weight.

Every layer becomes W + share * sum_i w_i s_i B_i A_i.
"""

from dataclasses import dataclass

from lora_compose.pipelines.denoising.passes import Pass
from lora_compose.pipelines.denoising.process import FixedPasses, Settings, constant_gates, one_text
from lora_compose.pipelines.denoising.session import Session


@dataclass(frozen=True)
class Fading(Settings):
    """The sum of all LoRAs, times a share.

    Attributes:
        share: Of every weight.
    """

    share: float = 0.5

    def start(self, session: Session) -> FixedPasses:
        """Constant gates for everything."""
        weights = self.share * session.concepts.weights_of(range(len(session.concepts.loaded)))
        return FixedPasses(session, [[(Pass(one_text(session, weights), constant_gates(session, weights)), 1.0)]])
'''


@pytest.fixture
def fading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A new method: its file, and its lines in the registries."""
    path = tmp_path / "your_method.py"
    path.write_text(YOUR_METHOD, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("your_method", path)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "your_method", module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(METHODS, "fading", module.Fading)  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(names, "METHODS", (*names.METHODS, "fading"))
    return module.Fading


@pytest.fixture
def loaded(pipe: Any, write_lora: Any) -> Any:
    for seed, (name, trigger) in enumerate((("cat", "sks"), ("dog", "zwx"))):
        path = write_lora(name, unet=random_lora(pipe.unet, seed, targets=EVERYTHING, size=0.1))
        pipe.load_concept(path, name, trigger=trigger, class_word=name)
    return pipe


def latents(pipe: Any, concepts: Any, method: Any) -> torch.Tensor:
    return pipe(
        "a sks cat and a zwx dog on grass", concepts=concepts, method=method, num_inference_steps=2,
        output_type="latent", generator=seeded(),
    ).images  # fmt: skip


def test_a_new_method_runs_by_name_and_by_its_settings(loaded: Any, fading: Any) -> None:
    found = latents(loaded, ["cat", "dog"], "fading")
    torch.testing.assert_close(found, latents(loaded, {"cat": 0.5, "dog": 0.5}, "merge"), atol=1e-4, rtol=1e-4)
    other = latents(loaded, ["cat", "dog"], fading(share=0.25))
    torch.testing.assert_close(other, latents(loaded, {"cat": 0.25, "dog": 0.25}, "merge"), atol=1e-4, rtol=1e-4)
    assert name_of(make_method("fading", {"share": 0.25})) == ("fading", {"share": 0.25})


@pytest.mark.usefixtures("fading")
def test_a_new_method_is_planned_and_listed(loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "METHODS_FILE", method_list.write(tmp_path / "methods.json"))
    planned = loaded.plan("a sks cat", concepts=["cat"], method="fading", num_inference_steps=2)
    assert (planned.method, planned.passes) == ("fading", 2)
    assert "fading: The sum of all LoRAs, times a share." in call("methods", "fading").output
    assert "--set share=0.5" in call("methods", "fading").output


def test_the_guide_names_every_file_that_a_method_touches() -> None:
    own = (
        "attention/text_bias.py", "pipelines/methods/freefuse.py", "pipelines/methods/region_bias.py",
        "pipelines/methods/draft.py",
    )  # fmt: skip
    assert left_out("Add a method", "freefuse", own) == set()
