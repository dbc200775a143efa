"""Who may import whom: attention <- pipelines <- compose <- ui.py, and nothing back; all under one import name."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "lora_compose"
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
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"  # a relative import cannot leave its package
        elif isinstance(node, ast.Call) and _imports_by_name(node) and isinstance(node.args[0], ast.Constant):
            yield node.lineno, str(node.args[0].value)


def _imports_by_name(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    return name in ("import_module", "__import__") and bool(call.args)


def arrows_the_wrong_way(root: Path) -> list[str]:
    wrong = set()
    for ring, path in modules(root):
        inner = RINGS[: RINGS.index(ring) + 1]
        for line, name in imported(path):
            first, *rest = name.split(".")
            # A ring by its own name is found in a clone alone, and what the whole exports is for users.
            ours = first in (*RINGS, "tests", "components", "reference")
            if ours or (first == PACKAGE and (not rest or rest[0] not in inner)):
                wrong.add(f"{path.relative_to(root)}:{line} imports {name}")
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
        firsts.setdefault(ring, set()).update(
            name.removeprefix(f"{PACKAGE}.").split(".")[0] for _, name in imported(path)
        )
    assert "attention" in firsts["pipelines"]
    assert "pipelines" in firsts["compose"]
    assert "torch" in firsts["attention"]


@pytest.mark.parametrize(
    ("ring", "statement"),
    [
        ("attention", "import lora_compose.pipelines.engine"),
        ("attention", "from lora_compose.pipelines import engine"),
        ("attention", "from lora_compose import pipelines"),
        ("attention", "from lora_compose import Concept"),
        ("attention", "import lora_compose"),
        ("attention", "def f():\n    from lora_compose.compose.cli import main"),
        ("attention", "if TYPE_CHECKING:\n    import torch, lora_compose.compose as c"),
        ("attention", "importlib.import_module('lora_compose.pipelines.engine')"),
        ("attention", "from attention.gates import Gates"),
        ("pipelines", "from lora_compose.compose import Scene"),
        ("pipelines", "import ui"),
        ("compose", "import ui"),
        ("compose", "from lora_compose import Scene"),
        ("compose", "from components import sd_unet"),
    ],
)
def test_a_wrong_arrow_is_seen_wherever_it_stands(tmp_path: Path, ring: str, statement: str) -> None:
    package = tmp_path / ring / "inner"
    package.mkdir(parents=True)
    (package.parent / "good.py").write_text(
        "import torch\nfrom lora_compose.attention import Gates\nfrom . import inner\n"
    )
    assert arrows_the_wrong_way(tmp_path) == []
    module = package.parent / "wrong.py"
    module.write_text(statement)
    (found,) = arrows_the_wrong_way(tmp_path)
    assert found.startswith(f"{ring}/wrong.py:{statement.count(chr(10)) + 1} imports ")
