"""Writes which layouts of LoRA files were refused before into `docs/lora-files.md`: `python docs/layouts_table.py`.

A layout in `tests/fixtures/lora_layouts` has `before` if an earlier version refused it, or lost a part of it. What is
read now is what `tests/pipelines/formats/test_layouts.py` checks.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE, LAYOUTS = ROOT / "docs" / "lora-files.md", ROOT / "tests" / "fixtures" / "lora_layouts"
HEADER = ("written by", "for", "before", "now")
_BLOCK = re.compile(r"(<!-- layouts -->\n).*?(<!-- end -->)", re.DOTALL)


def written(text: str) -> str:
    """The page with the table anew."""
    lines = [HEADER, ("---",) * len(HEADER), *rows()]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return _BLOCK.sub(lambda found: f"{found[1]}{table}\n{found[2]}", text)


def rows() -> Iterator[tuple[str, ...]]:
    """A row for each layout that was not read before."""
    for path in sorted(LAYOUTS.glob("*.json")):
        known = json.loads(path.read_text(encoding="utf-8"))
        if "before" in known:
            yield f"[{known['writer']}]({known['source']})", known["family"], known["before"], _now(known)


def _now(known: dict[str, Any]) -> str:
    read = " and ".join(f"{layers} layers of {part}" for part, layers in known["layers"].items())
    return f"{read}; {known['noted']}" if "noted" in known else read


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
