"""Latents of fixed runs, as they were when they were recorded (`goldens.py` makes and records them)."""

import json
from pathlib import Path

import pytest

from all_transformers import TRANSFORMERS
from goldens import GOLDENS, RECORDED, numbers
from pairs import slow_but

CHEAP = [name for name, golden in GOLDENS.items() if golden.cheap]
SLOW = {
    *(f"sdxl: {method}" for method in ("tara", "regional", "composite", "clora", "draft", "freefuse")),
    *(f"{family}: {run}" for family in TRANSFORMERS if family != "flux" for run in ("merge unguided", "draft")),
    *(f"sd: {run}" for run in ("Heun", "guidance 1", "odd canvas", "one step", "mask image")),
}
"""Methods on a second UNet and on more than one transformer; calls that are compared with a reference elsewhere."""


@pytest.mark.parametrize("name", slow_but({*CHEAP} - SLOW, CHEAP))
def test_latents_are_what_they_were(name: str) -> None:
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))[name]
    assert numbers(GOLDENS[name].latents()) == pytest.approx(recorded, abs=1e-3 * recorded[-1])  # of their deviation


def test_what_is_recorded_is_what_is_compared() -> None:
    assert set(json.loads(RECORDED.read_text(encoding="utf-8"))) == set(CHEAP)


def test_contributing_says_how_many_runs_there_are() -> None:
    page = Path(__file__).resolve().parents[1] / "CONTRIBUTING.md"
    assert f": {len(GOLDENS)} runs, bit for bit" in page.read_text(encoding="utf-8")
