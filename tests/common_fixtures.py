"""Fixtures: small real components, and the playground. Everything runs offline on the CPU."""

import gc
import inspect
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.utils import logging as diffusers_logging

from components import FAMILIES, WHOLE, save_lora
from lora_compose.attention import Lora
from lora_compose.attention.backbones.unet import ComposeAttnProcessor
from lora_compose.compose.check import report
from lora_compose.compose.generate import models
from lora_compose.compose.playground.assets import PLAYGROUNDS, playground_lora, playground_model
from lora_compose.pipelines.families import ComposePipeline
from lora_compose.pipelines.families.stable_diffusion import ComposeStableDiffusionPipeline
from lora_compose.pipelines.families.unets import UNetPipeline
from lora_compose.pipelines.support.notes import logged
from made_once import made_once

# HYPOTHESIS_PROFILE=thorough tries thousands of examples.
for name, examples in (("suite", 25), ("thorough", 2_000)):
    slow = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large]
    hypothesis.settings.register_profile(name, max_examples=examples, deadline=None, suppress_health_check=slow)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))
torch.set_num_threads(1)
for processor in (AttnProcessor2_0, ComposeAttnProcessor):  # diffusers asks for it in every layer of every pass
    processor.__call__.__signature__ = inspect.signature(processor.__call__)  # pyright: ignore[reportFunctionMemberAccess]
diffusers_logging.disable_progress_bar()


class Copying:
    """Opens models as `ComposePipeline` does, but copies a playground that was opened before."""

    from_single_file = ComposePipeline.from_single_file
    opened_before = staticmethod(made_once(ComposePipeline.from_pretrained))

    @classmethod
    def from_pretrained(cls, source: str, **options: Any) -> Any:
        known = source in {str(playground_model(name)) for name in PLAYGROUNDS}
        return (cls.opened_before if known else ComposePipeline.from_pretrained)(source, **options)


def pytest_collection_finish() -> None:
    """What is imported stays: the garbage collector need not walk through it, and seldom through what tests keep."""
    gc.collect()
    gc.freeze()
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, 100)  # what lives long is walked through ten times less often
    # In each phase of each test, pytest gives handlers to all loggers that do not propagate: most are of these two.
    for logger in logging.root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger) and logger.name.startswith(("torch.", "streamlit.")):
            logger.propagate = True


@pytest.fixture
def family() -> str:
    """The model family: "sd", or "sdxl" where a test is parametrised so."""
    return "sd"


@pytest.fixture
def whole() -> bool:
    """Whether the UNet has all levels of its family, or only two: True where a test is parametrised so."""
    return False


@pytest.fixture
def pipe(family: str, whole: bool) -> Any:
    """A small pipeline with random weights, new for every test."""
    pipe = (WHOLE if whole else FAMILIES)[family]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def write_lora(tmp_path: Path) -> Callable[..., Path]:
    """Writes factors as a diffusers LoRA file: `write_lora(name, unet=..., text_encoder=..., metadata=...)`."""

    def write(name: str, metadata: dict[str, str] | None = None, **parts: Lora) -> Path:
        return save_lora(tmp_path / f"{name}.safetensors", metadata, **parts)

    return write


@pytest.fixture(scope="session")
def _playground() -> Any:
    pipe = ComposeStableDiffusionPipeline.from_pretrained(playground_model())
    pipe.set_progress_bar_config(disable=True)
    for name in ("cat", "dog", "bear", "robot"):
        pipe.load_concept(playground_lora(f"{name}-tara"), name=name)
        pipe.load_concept(playground_lora(name), name=f"{name}-ordinary")
    return pipe


@pytest.fixture
def playground(_playground: Any) -> Iterator[Any]:
    """The playground with TARA LoRAs "cat", "dog", "bear", "robot" and ordinary ones "cat-ordinary", ..., shared."""
    names = list(_playground.concepts)
    scheduler = _playground.scheduler
    yield _playground
    _playground.scheduler = scheduler
    for name in _playground.concepts.keys() - set(names):
        _playground.unload_concept(name)


@pytest.fixture(scope="module")
def playgrounds_opened_once() -> Iterator[None]:
    """Commands open a playground by copying it, except the first: a process reads and builds it once."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(models, "ComposePipeline", Copying)
        yield


@pytest.fixture(scope="module")
def tensors_of_others_do_not_count() -> None:
    """Where all tensors of the process are summed, those that earlier tests keep take a second, and say nothing."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def costs_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks price all images alike, for tests that look at no cost: counting one takes longer than making it."""
    monkeypatch.setattr(report, "_cost", lambda *args: report.RunCost("2", 1, 1))


@pytest.fixture
def small_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """UNets make 64 x 64 pixels where no size is given: a ninth of the playground's, for tests that look at no size."""
    monkeypatch.setattr(UNetPipeline, "_size", lambda self, width, height: (width or 64, height or 64))


@pytest.fixture
def plain_pipe(family: str, whole: bool) -> Any:
    """diffusers' own pipeline with the same weights as `pipe`."""
    made = (WHOLE if whole else FAMILIES)[family]
    pipe = made(StableDiffusionPipeline if family == "sd" else StableDiffusionXLPipeline)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(autouse=True)
def _messages_are_new() -> None:
    """A warning that is logged once per process may have been logged by another test."""
    logged.clear()
