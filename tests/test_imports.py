"""Who may import whom: attention <- pipelines <- compose <- ui.py, and nothing back."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RINGS = ("attention", "pipelines", "compose", "ui")


def modules(root: Path) -> Iterator[tuple[str, Path]]:
    """Ring and path of every module."""
    for ring in RINGS:
        paths = [root / f"{ring}.py"] if (root / f"{ring}.py").exists() else sorted((root / ring).rglob("*.py"))
        for path in paths:
            yield ring, path


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything that a module imports, also inside functions and for types alone."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.lineno, node.module  # a relative import cannot leave its package
        elif isinstance(node, ast.Call) and _imports_by_name(node) and isinstance(node.args[0], ast.Constant):
            yield node.lineno, str(node.args[0].value)


def _imports_by_name(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    return name in ("import_module", "__import__") and bool(call.args)


def arrows_the_wrong_way(root: Path) -> list[str]:
    wrong = set()
    for ring, path in modules(root):
        outer = RINGS[RINGS.index(ring) + 1 :]
        for line, name in imported(path):
            first = name.split(".")[0]
            if first in (*outer, "tests", "components", "reference"):
                wrong.add(f"{path.relative_to(root)}:{line} imports {first}")
    return sorted(wrong)


def test_inner_packages_do_not_import_outer_ones() -> None:
    assert arrows_the_wrong_way(ROOT) == []


def test_every_package_is_looked_at() -> None:
    found = {ring for ring, _ in modules(ROOT)}
    assert {"attention", "pipelines", "compose"} <= found
    assert ("pipelines", ROOT / "pipelines/methods/tara.py") in set(modules(ROOT))


def test_the_rings_use_each_other() -> None:
    """So that the test above cannot pass because imports are no longer recognised."""
    firsts: dict[str, set[str]] = {}
    for ring, path in modules(ROOT):
        firsts.setdefault(ring, set()).update(name.split(".")[0] for _, name in imported(path))
    assert "attention" in firsts["pipelines"]
    assert "pipelines" in firsts["compose"]
    assert "torch" in firsts["attention"]


@pytest.mark.parametrize(
    ("ring", "statement"),
    [
        ("attention", "import pipelines.engine"),
        ("attention", "from pipelines import engine"),
        ("attention", "def f():\n    from compose.cli import main"),
        ("attention", "if TYPE_CHECKING:\n    import torch, compose as c"),
        ("attention", "importlib.import_module('pipelines.engine')"),
        ("pipelines", "from compose import Scene"),
        ("pipelines", "import ui"),
        ("compose", "import ui"),
        ("compose", "from components import sd_unet"),
    ],
)
def test_a_wrong_arrow_is_seen_wherever_it_stands(tmp_path: Path, ring: str, statement: str) -> None:
    package = tmp_path / ring / "inner"
    package.mkdir(parents=True)
    (package.parent / "good.py").write_text("import torch\nfrom attention import Gates\nfrom . import inner\n")
    assert arrows_the_wrong_way(tmp_path) == []
    module = package.parent / "wrong.py"
    module.write_text(statement)
    (found,) = arrows_the_wrong_way(tmp_path)
    assert found.startswith(f"{ring}/wrong.py:{statement.count(chr(10)) + 1} imports ")
