"""bf16 on the CPU: used where it is as fast as fp32, and no secret where it is not."""

import logging
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compose.models import threads
from compose.precision import cpu_autocast, cpu_has_bf16
from compose.training import Training
from compose.training.loop import _accelerator


def seconds(dtype: torch.dtype) -> float:
    """The shortest time of a product of two matrices."""
    one = torch.randn(192, 192).to(dtype)
    times = []
    for _ in range(9):
        start = time.perf_counter()
        torch.mm(one, one)
        times.append(time.perf_counter() - start)
    return min(times)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="PyTorch asks oneDNN, which is for x86")
def test_a_cpu_has_bf16_if_it_multiplies_nearly_as_fast_in_it() -> None:
    with threads(1):
        slowdown = seconds(torch.bfloat16) / seconds(torch.float32)
    assert cpu_has_bf16() == (slowdown < 8), f"bf16 takes {slowdown:.1f} times as long as fp32"


def test_autocasting_follows() -> None:
    one = torch.ones(2, 2)
    with cpu_autocast():
        assert (one @ one).dtype == (torch.bfloat16 if cpu_has_bf16() else torch.float32)


@pytest.mark.parametrize("fast", [True, False])
def test_the_playground_is_trained_in_what_the_machine_is_fast_in(
    fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compose.training.settings.cpu_has_bf16", lambda: fast)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    words: dict[str, Any] = {"pictures": tmp_path, "out": tmp_path / "a.safetensors", "trigger": "sks"}
    preset: Callable[..., Training] = Training.preset
    suits = "bf16" if fast else "no"
    assert preset("playground", class_word="cat", **words).mixed_precision == suits
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert preset("playground", class_word="cat", **words).mixed_precision == "bf16"
    assert preset("playground", class_word="cat", cpu=True, **words).mixed_precision == suits
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert preset("playground", class_word="cat", mixed_precision="bf16", **words).mixed_precision == "bf16"


@pytest.mark.parametrize("fast", [True, False])
def test_slow_bf16_is_warned_about(
    fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("compose.training.loop.cpu_has_bf16", lambda: fast)
    words: dict[str, Any] = {"pictures": tmp_path, "out": tmp_path / "a.safetensors", "trigger": "sks"}
    with caplog.at_level(logging.WARNING):
        for precision in ("no", "bf16"):
            _accelerator(Training(class_word="cat", model="m", mixed_precision=precision, cpu=True, **words))
    said = [record.message for record in caplog.records if "no instructions for bf16" in record.message]
    assert len(said) == (0 if fast else 1)
