"""Fixtures: pipelines that diffusers imports from a file."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from diffusers.utils import dynamic_modules_utils


@pytest.fixture
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """diffusers copies the file into a cache below the home folder, where it imports it from; here one per test."""
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield
    for name in [name for name in sys.modules if name.startswith("diffusers_modules") and name not in before]:
        del sys.modules[name]
