"""Evaluations become tables of the docs."""

import re
from pathlib import Path
from types import ModuleType

import pytest

from doc_tables import program
from evaluations import known, store, suite


@pytest.fixture
def tables() -> ModuleType:
    """The program that writes them."""
    return program("results_tables")


def test_a_finished_evaluation_becomes_a_table(
    tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenes = {"small both": ("cat", "dog"), "cat alone": ("cat",)}
    folder = store(tmp_path / "small", suite(scenes), known)
    name, found = tables.kept(folder)
    assert name == "small"
    assert {"success, small", "success, one"} <= set(found.columns)
    found.to_csv(tmp_path / "small.csv", index=False)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    before = "A\n\n<!-- results: small | success | against merge | success, one | FLOPs -->\nold\n<!-- end -->\n\nB\n"
    page = tables.written(before)
    assert tables.written(page) == page
    lines = page.splitlines()
    assert lines[3] == "|  | success | against merge | success, one | FLOPs |"
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines[5:-3]}
    assert list(rows) == [
        f"*{arm}*" if role == "sanity" else arm for arm, role in zip(found.arm, found.role, strict=True)
    ]
    tara = found[found.arm == "tara"].iloc[0]
    assert rows["tara"][0].startswith(f"{tara.success:.2f} (")
    assert rows["tara"][1].startswith(tara.success_verdict)
    assert rows["tara"][3] == "2.00"
    assert rows["merge"][1] == ""


def test_an_unfinished_evaluation_is_refused(tables: ModuleType, tmp_path: Path) -> None:
    folder = store(tmp_path, suite(), lambda batch, seed: None if batch.arm.name == "tara" else known(batch, seed))
    with pytest.raises(ValueError, match="is not finished"):
        tables.kept(folder)


def test_numbers_have_a_minus_and_gaps_are_empty(tables: ModuleType) -> None:
    row = {"leak": -0.047, "clip_t": float("nan"), "success": 0.5, "success_low": float("nan"), "success_high": 1.0}
    assert tables.COLUMNS["leak"](row) == "\N{MINUS SIGN}0.05"
    assert tables.COLUMNS["CLIP-T"](row) == ""
    assert tables.COLUMNS["success"](row) == "0.50"


def test_tables_of_all_pages_are_those_of_the_results(tables: ModuleType) -> None:
    pages = {page: page.read_text(encoding="utf-8") for page in tables.PAGES}
    assert [page.name for page, text in pages.items() if tables.written(text) != text] == []
    shown = {suite for text in pages.values() for suite in re.findall(r"<!-- results: ([\w-]+) \|", text)}
    assert shown == {file.stem for file in tables.RESULTS.glob("*.csv")}
