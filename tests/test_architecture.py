"""ARCHITECTURE.md is true: the rings, where the central types are, and how a call goes through the files."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from components import random_lora, seeded, tiny_pipeline
from test_imports import FOLDERS, RINGS

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
TYPES = re.findall(r"^\| `(\w+)` \| `([\w/.]+)` \|", TEXT, re.MULTILINE)
_DECIDED = TEXT.partition("## Where things are decided")[2].partition("\n## ")[0]
DECIDED = re.findall(r"^\| [\w ,`()'.]+ \| `([\w/]+\.py)` \| `(\w+)`", _DECIDED, re.MULTILINE)
WALK = re.findall(r"^\| \d+ \| `([\w/.]+)` \| `(\w+)` \|", TEXT, re.MULTILINE)
PROMPT = "a sks cat and a zwx dog on grass"


def defined_in(path: str) -> set[str]:
    """Names of classes and functions."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef | ast.FunctionDef)}


def test_the_rings_are_those_that_imports_keep_to():
    drawn = next(line for line in TEXT.splitlines() if line.startswith("attention ") and "<-" in line)
    assert tuple(re.findall(r"\w+", drawn)) == RINGS


def test_the_folders_of_pipelines_are_those_that_imports_keep_to():
    rows = re.findall(r"^\| (`\w+/`(?:, `\w+/`)*) \|", TEXT, re.MULTILINE)
    assert tuple(re.findall(r"\w+", " ".join(rows))) == FOLDERS["pipelines"]


@pytest.mark.parametrize(("name", "path"), TYPES)
def test_a_central_type_is_in_its_file(name, path):
    assert name in defined_in(path)


def test_the_central_types_are_named():
    assert {"Backbone", "Gates", "Pass", "Denoiser", "Session", "Process", "ResolvedCall", "Task"} <= {
        name for name, _ in TYPES
    }


def test_what_is_decided_is_decided_there():
    assert len(DECIDED) >= 12
    assert [(path, name) for path, name in DECIDED if name not in defined_in(path)] == []


def test_no_function_of_pipelines_takes_a_pipeline_of_any_type():
    texts = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "pipelines").rglob("*.py"))}
    assert len(texts) > 100
    assert [path.name for path, text in texts.items() if re.search(r"\bpipe(line)?: Any\b", text)] == []


def entered(pipe: Any) -> Iterator[tuple[str, str]]:
    """File and function of everything of ours that a call enters, in this order."""
    seen: list[tuple[str, str]] = []

    def look(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and "lora_compose" in frame.f_code.co_filename:
            path = frame.f_code.co_filename.rpartition("lora_compose/")[2]
            seen.append((path, frame.f_code.co_name))

    sys.setprofile(look)
    try:
        pipe(
            PROMPT, concepts=["cat", "dog"], method="clora", num_inference_steps=2, generator=seeded(), output_type="np"
        )
    finally:
        sys.setprofile(None)
    yield from dict.fromkeys(seen)


def test_a_call_enters_the_files_of_the_walk_in_this_order(write_lora):
    pipe = tiny_pipeline()
    for seed, (name, trigger) in enumerate((("cat", "sks"), ("dog", "zwx"))):
        path = write_lora(name, unet=random_lora(pipe.unet, seed))
        pipe.load_concept(path, trigger=trigger, class_word=name)
    assert len(WALK) <= 12
    assert len({path for path, _ in WALK}) == len(WALK)
    assert [step for step in entered(pipe) if step in WALK] == WALK
