"""How tables of the benchmark look."""

from collections.abc import Sequence

from rich.box import SIMPLE
from rich.table import Table

MIB, GIB = 2**20, 2**30
_NAMES = ("method", "model", "what")


def new_table(title: str, headers: Sequence[str]) -> Table:
    """A table without rows; names are on the left of their column, numbers on the right."""
    table = Table(title=title, box=SIMPLE)
    for header in headers:
        table.add_column(header, justify="left" if header in _NAMES else "right", no_wrap=True)
    return table
