"""Tables of scenes: CSV with a header, or JSONL. Every row is read by itself: a bad one does not affect others."""

import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from lora_compose.compose.files.reading import FileError, read_text
from lora_compose.compose.files.text import parse_json

SUFFIXES = (".csv", ".tsv", ".jsonl")
MOST_BYTES = 64 * 2**20
MOST_ROWS = 100_000


@dataclass(frozen=True)
class Row:
    """A row of a table: its line in the file, from 1, and its values by column, or why it cannot be read."""

    line: int
    values: dict[str, Any]
    error: str | None = None


@dataclass(frozen=True)
class Table:
    """All rows of a table, and the columns of its header; None if every row names its own (JSONL)."""

    columns: Sequence[str] | None
    rows: Sequence[Row]


def read_table(path: Path) -> Table:
    """Reads a table: CSV (comma, semicolon or tab) with a header, or JSONL. Raises FileError if it is none."""
    text = read_text(path, MOST_BYTES, "; divide it into several tables")
    if path.suffix.lower() == ".jsonl":
        lines = enumerate(text.split("\n"), 1)
        table = Table(None, [_json_row(line, part) for line, part in lines if part.strip()])
    else:
        table = _csv(text, path)
    if not table.rows:
        raise FileError(f"{path} has no rows")
    if len(table.rows) > MOST_ROWS:
        raise FileError(f"{path} has more than {MOST_ROWS} rows; divide it into several tables")
    return table


def _json_row(line: int, text: str) -> Row:
    try:
        row = parse_json(text, "the row")
    except FileError as error:
        return Row(line, {}, str(error))
    if not isinstance(row, dict):
        return Row(line, {}, 'expected one row as {"column": value, ...}')
    return Row(line, row)


def _csv(text: str, path: Path) -> Table:
    first = text.lstrip().split("\n", 1)[0]
    delimiter = next((mark for mark in ",;\t" if mark in first), ",")
    rows = _records(text, delimiter)
    line, header, error = next(rows, (1, [], "there is no header"))
    columns = [name.strip() for name in header]
    twice = [name for name, times in Counter(columns).items() if times > 1]
    if error is None and twice:
        error = f"the column {twice[0]!r} stands twice"
    if error is None and "" in columns:
        error = f"column {columns.index('') + 1} has no name"
    if error is not None:
        raise FileError(f"{path}, line {line}: {error}; expected a header such as name,prompt,seed")
    return Table(columns, [_csv_row(columns, *row) for row in rows])


def _csv_row(columns: Sequence[str], line: int, cells: Sequence[str], error: str | None) -> Row:
    if error is None and len(cells) != len(columns):
        error = (
            f"{len(cells)} cells, but the header has {len(columns)} columns; put text with a separator in it in quotes"
        )
    return Row(line, {} if error else dict(zip(columns, cells, strict=True)), error)


def _records(text: str, delimiter: str) -> Iterator[tuple[int, list[str], str | None]]:
    """Line, cells and error of all rows that are not blank, up to the first one that is not CSV."""
    reader = csv.reader(StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, [], f"not valid CSV: {error}; what follows is not read"
            return
        if any(cell.strip() for cell in cells):
            yield line, cells, None
