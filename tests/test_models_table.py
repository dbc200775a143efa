"""The tables of model families, and of diffusers' own tests, are those of the code and of the tests that ran."""

import json
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

from all_transformers import TRANSFORMERS
from doc_tables import program
from lora_compose.pipelines.families import ComposePipeline
from lora_compose.pipelines.formats.recognise import Guess
from lora_compose.pipelines.methods import METHODS
from transformer_families import CALL, Family, pipeline_with_concepts

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def made() -> ModuleType:
    """The program that writes the table of families."""
    return program("models_table")


def test_what_came_of_tests_of_diffusers_is_on_the_page(tmp_path: Path) -> None:
    table = program("diffusers_table")
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert page == table.written(page), "run python docs/diffusers_table.py"
    skipped, expected = "('common.py', 387, 'Skipped: no GPU')", "common.py:1: in test\nE   TypeError"
    came = {
        "a": ("passed", "", "passed"), "b": ("failed", "E  ValueError: mask_image is all black", "passed"),
        "c": ("failed", "E  KeyError", "passed"), "d": ("failed", "E  far", "failed"),
        "e": ("skipped", skipped, "skipped"), "f": ("skipped", expected, "skipped"),
        "g": ("failed", "[XPASS(strict)] to be revisited", "skipped"),
    }  # fmt: skip
    for mode, at in (("concepts", 0), ("control", 2)):
        outcomes = {name: (one[at], one[1]) for name, one in came.items()}
        (tmp_path / f"SD.{mode}.json").write_text(json.dumps(outcomes))
    assert table.counts(tmp_path) == {
        "SD": {"passed": 2, "refused": 1, "failed": 1, "fails in diffusers too": 2, "not run here": 1}
    }


def test_files_that_were_refused_before_are_on_the_page() -> None:
    table = program("layouts_table")
    page = (ROOT / "docs" / "lora-files.md").read_text(encoding="utf-8")
    assert page == table.written(page), "run python docs/layouts_table.py"
    assert len([*table.rows()]) >= 8


def test_the_page_has_the_table_and_every_family_a_row(made: ModuleType) -> None:
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert page == made.written(page), "run python docs/models_table.py"
    rows = [line.split(" | ")[0].removeprefix("| ") for line in made.table().splitlines()[2:]]
    assert sorted(rows) == sorted(family.family for family in ComposePipeline.families)


@pytest.mark.parametrize("name", ["anima", "flux2", "qwen-image"])
def test_methods_of_a_row_are_those_that_a_call_takes(made: ModuleType, name: str, tmp_path: Path) -> None:
    family: Family = TRANSFORMERS[name]
    pipe = pipeline_with_concepts(family, tmp_path)
    boxes = {"cat": (0, 0, 64, 128), "dog": (64, 0, 128, 128)}
    refused: dict[str, str] = {}
    for method in METHODS:
        try:
            pipe.plan(**{**CALL, **family.guided}, concepts=boxes, method=method)
        except ValueError as error:
            refused[method] = str(error)
    assert list(refused) == made.refused(type(pipe))
    assert all("needs cross-attention that reads a text for each region" in message for message in refused.values())


def test_merging_is_what_the_keys_of_a_whole_file_are_recognised_for(
    made: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    families = {family.family: family for family in ComposePipeline.families}
    assert made.merges(families["FLUX.3 distilled"])
    monkeypatch.setattr(made, "guess_family", lambda *_: Guess(None, False, ()))
    assert not made.merges(families["FLUX.3 distilled"])


def test_only_what_passed_counts(made: ModuleType, tmp_path: Path) -> None:
    cases = (
        ("test_transformer_memory", "test_loras_act_on_weights_in_few_bits[layerwise_casting-z-image]", ""),
        ("test_transformer_memory", "test_loras_act_on_weights_in_few_bits[gguf-z-image]", "<skipped/>"),
        ("test_transformer_memory", "test_an_offloaded_transformer[by_blocks-kontext]", ""),
        ("test_transformer_memory", "test_an_offloaded_transformer[by_layers-kontext]", "<failure/>"),
        ("test_devices", "test_an_offloaded_pipeline[offload_layers_to_the_device]", ""),
        ("test_devices", "test_double_precision", ""),
    )
    lines = [f'<testcase classname="tests.{where}" name="{name}">{inside}</testcase>' for where, name, inside in cases]
    suite = f'<testsuite timestamp="2026-11-28T06:14:37+00:00">{"".join(lines)}</testsuite>'
    (tmp_path / "report.xml").write_text(suite)
    ran = {"date": "2026-11-28", "diffusers": version("diffusers")}
    assert made.outcomes([tmp_path / "report.xml"]) == {
        "made": {"FLUX.1 Kontext": ran, "Stable Diffusion 1.x and 2.x": ran, "Z-Image": ran},
        "offloaded": {"FLUX.1 Kontext": ["blocks"], "Stable Diffusion 1.x and 2.x": ["layers"]},
        "fewer bits": {"Z-Image": ["float8"]},
    }
