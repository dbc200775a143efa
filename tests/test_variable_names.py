"""Variables are named after what they hold; classes of the ComfyUI nodes have names that no other class has."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EMPTY = {"found", "one"}  # which say nothing of what they hold
FOLDERS = ["attention", "pipelines", "compose"]


def bound(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Names and lines of arguments and variables; fields of classes are no variables."""
    fields = {id(field.target) for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
              for field in node.body if isinstance(field, ast.AnnAssign)}  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and id(node) not in fields:
            yield node.id, node.lineno
        elif isinstance(node, ast.ExceptHandler) and node.name is not None:
            yield node.name, node.lineno


@cache
def tree(path: Path) -> ast.Module:
    """The syntax tree of a module."""
    return ast.parse(path.read_text(encoding="utf-8"))


def with_empty_names(folder: str) -> list[tuple[str, int, str]]:
    """Files, lines and names of variables of a folder that say nothing."""
    files = [(path, path.relative_to(ROOT).as_posix()) for path in sorted((ROOT / folder).rglob("*.py"))]
    assert files
    return [(name, line, variable) for path, name in files for variable, line in bound(tree(path)) if variable in EMPTY]


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_variable_has_a_name_that_says_nothing(folder: str) -> None:
    assert [f"{name}:{line} {variable}" for name, line, variable in with_empty_names(folder)] == []


def test_arguments_loops_and_walruses_are_seen() -> None:
    source = "def f(one): ...\nfor found in ():\n    if one := found: ...\nclass C:\n    found: int = 0\n"
    assert list(bound(ast.parse(source))) == [("found", 2), ("one", 1), ("one", 3)]


def classes_of(folder: Path) -> dict[str, set[str]]:
    """The classes of a folder by name, with the files that define them."""
    classes: dict[str, set[str]] = {}
    for path in folder.rglob("*.py"):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef):
                classes.setdefault(node.name, set()).add(path.relative_to(ROOT).as_posix())
    return classes


def test_no_class_of_the_comfyui_nodes_is_called_as_another_class() -> None:
    nodes = classes_of(ROOT / "compose/comfyui")
    assert len(nodes) > 20
    everywhere = [classes_of(ROOT / folder) for folder in FOLDERS]
    named = {name: set().union(*(classes.get(name, set()) for classes in everywhere)) for name in nodes}
    assert {name: files for name, files in named.items() if len(files) > 1} == {}
