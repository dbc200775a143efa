"""diffusers' own pipeline tests pass with our classes, and with every call through a concept, but for what we refuse.

`DIFFUSERS_TESTS=FOLDER pytest -m slow tests/test_diffusers_own.py`, where FOLDER is a clone of diffusers at the version
that is installed (only its `tests` is read); `parameterized` and `requests-mock` have to be installed.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

FILES = (
    "SD", "SD, image to image", "SD, inpainting", "SDXL", "SDXL, image to image", "SDXL, inpainting", "Chroma",
    "Chroma, image to image", "FLUX.1",
    "FLUX.1, image to image", "FLUX.1, inpainting", "FLUX.1 Kontext", "FLUX.2-dev", "FLUX.2-klein",
    "FLUX.2-klein, inpainting", "Ideogram 4", "Krea 2", "Qwen-Image", "Qwen-Image, image to image",
    "Qwen-Image, inpainting", "Qwen-Image-Edit-Plus", "Z-Image", "Z-Image, image to image",
    "Z-Image, inpainting",
)  # fmt: skip
"""As `diffusers_own.FILES` has them, which takes seconds to import."""

REFUSED = (
    "IP-Adapter images can be combined with concepts on", "further reference images cannot be combined with",
    "unknown argument 'masked_image_latents'", "mask_image is all black", "unknown argument 'denoising_start'",
    "prompt_upsampling cannot be combined with concepts", "reads one reference image with concepts",
    "inpainting with concepts does not support AsymmetricAutoencoderKL",
)  # fmt: skip
"""What docs/limits.md lists, as the errors say it."""

PRIVATE = "no attribute '_encode_vae_image'"
"""What is raised by the one test that calls a private method, of diffusers' class for inpainting with SDXL."""

BETTER = "[XPASS(strict)]"
"""What is said of a test that passes although diffusers' own pipeline is expected to fail it."""

FOLDER = os.environ.get("DIFFUSERS_TESTS")
TESTS = Path(__file__).parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(FOLDER is None, reason="DIFFUSERS_TESTS does not say where a clone of diffusers is"),
    pytest.mark.skipif(find_spec("parameterized") is None, reason="diffusers' tests need `parameterized`"),
    pytest.mark.skipif(find_spec("requests_mock") is None, reason="diffusers' tests need `requests-mock`"),
]


def failures(name: str, mode: str, folder: Path) -> dict[str, str]:
    """What failed, with what was raised."""
    report = folder / f"{mode}.json"
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    command: list[Any] = [sys.executable, "-m", "diffusers_own", FOLDER, mode, report, name]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, check=False)
    outcomes = json.loads(report.read_text(encoding="utf-8"))
    assert any(outcome == "passed" for outcome, _ in outcomes.values())
    failed = {test: text for test, (outcome, text) in outcomes.items() if outcome == "failed"}
    return {test: text for test, text in failed.items() if not text.startswith(BETTER)}


@pytest.mark.parametrize("name", FILES)
def test_what_fails_with_our_classes_only_is_refused_with_words(name: str, tmp_path: Path) -> None:
    control = failures(name, "control", tmp_path)
    for mode in ("ours", "concepts"):
        found = {test: text for test, text in failures(name, mode, tmp_path).items() if test not in control}
        unknown = {test: text for test, text in found.items() if not any(it in text for it in (*REFUSED, PRIVATE))}
        assert not unknown
