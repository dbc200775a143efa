"""Lists of steps in CONTRIBUTING.md, and the files that they leave out: `from guides import left_out`."""

import re
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_KINDS = {".py", ".md", ".yml"}


def left_out(heading: str, pattern: str, own: Iterable[str]) -> set[str]:
    """Files with a pattern that the steps under a heading neither name by path nor find by a `git grep` of theirs.

    Args:
        pattern: A regular expression for the name of a method or family that is there already; case does not matter.
        own: Beginnings of paths of its own files.
    """
    steps = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition(f"## {heading}\n")[2].partition("\n## ")[0]
    named = set(re.findall(r"`([\w./-]+)", steps))
    searched = re.findall(r'`git grep -liE "(.+?)" ([^`]+)`', steps)
    touched = [path for path in _files() if re.search(pattern, _text(path), re.IGNORECASE)]
    assert len(touched) > 10
    return {
        path
        for path in touched
        if path not in named
        and not path.startswith(tuple(own))
        and not any(re.search(word, _text(path), re.IGNORECASE) and _lies_in(path, where) for word, where in searched)
    }


def _files() -> list[str]:
    """Product, tests, docs and the site's list of pages."""
    places = ("attention", "pipelines", "compose", "tests", "docs")
    single = (ROOT / name for name in ("lora_compose/__init__.py", "README.md", "ARCHITECTURE.md", "mkdocs.yml"))
    every = [*(path for place in places for path in (ROOT / place).rglob("*")), *single]
    return sorted(path.relative_to(ROOT).as_posix() for path in every if path.suffix in _KINDS)


def _text(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def _lies_in(path: str, places: str) -> bool:
    return any(path == place or path.startswith(f"{place}/") for place in places.split())
