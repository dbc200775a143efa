"""Tables, sentences and programs of the docs: `from doc_tables import program, rows_of, table, text_of`."""

import importlib.util
import re
from collections.abc import Mapping
from types import ModuleType

from snippets import ROOT


def text_of(page: str) -> str:
    """A page in one line."""
    return " ".join((ROOT / page).read_text(encoding="utf-8").split())


def table(page: str, after: str) -> list[list[str]]:
    """The cells of the first table after some words of a page; an empty first cell repeats the one above it."""
    text = (ROOT / page).read_text(encoding="utf-8")
    assert after in text, after
    found = re.search(r"(?:^\|.*\n)+", text.partition(after)[2], re.MULTILINE)
    assert found is not None
    rows: list[list[str]] = []
    for line in found[0].splitlines():
        cells = [cell.strip().replace("*", "").replace("`", "") for cell in line.strip("|").split("|")]
        rows.append([cells[0] or (rows[-1][0] if rows else ""), *cells[1:]])
    return rows


def rows_of(page: str, after: str) -> Mapping[str, list[str]]:
    """The rows of the first table after some words of a page, by their first cell."""
    return {name: cells for name, *cells in table(page, after)[2:]}


def program(name: str) -> ModuleType:
    """A program of the docs."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
