"""Imports go one way: attention <- pipelines <- compose <- ui.py, and nothing back; all under one import name.

Inside pipelines and compose they go one way as well, from folder to folder, and no modules import each other in a
circle.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from lora_compose import attention

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "lora_compose"
RINGS = ("attention", "pipelines", "compose", "ui")
FOLDERS = {
    "pipelines": (
        "support", "formats", "merging", "scene", "concepts", "text", "images", "control", "denoising", "methods",
        "calls", "families",
    ),
    "compose": (
        "support", "playground", "files", "figures", "generate", "cluster", "batch", "serve", "benchmark", "lora",
        "check", "training", "evaluation", "page", "comfyui", "commands", "cli",
    ),
}  # fmt: skip
"""The parts of a ring; each may import those before it."""


def modules(root: Path) -> Iterator[tuple[str, Path]]:
    """Ring and path of every module."""
    for ring in RINGS:
        paths = [root / f"{ring}.py"] if (root / f"{ring}.py").exists() else sorted((root / ring).rglob("*.py"))
        for path in paths:
            yield ring, path


def imported(path: Path) -> Sequence[tuple[int, str]]:
    """Line and absolute name of everything that a module imports, also inside functions and for types alone."""
    return _imported_in(path.read_text(encoding="utf-8"))


@cache
def _imported_in(text: str) -> Sequence[tuple[int, str]]:
    return tuple(_imports(text))


def _imports(text: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(text)):
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


def graph(root: Path, rings: tuple[str, ...]) -> dict[str, set[str]]:
    """What every module of some rings imports from these rings, by the names they have in a clone."""
    found = {_name(path.relative_to(root)): path for ring, path in modules(root) if ring in rings}
    edges: dict[str, set[str]] = {}
    for name, path in found.items():
        targets = (_module(target.removeprefix(f"{PACKAGE}."), found) for _, target in imported(path))
        edges[name] = {target for target in targets if target is not None}
    return edges


def _name(path: Path) -> str:
    return ".".join(path.parent.parts if path.name == "__init__.py" else path.with_suffix("").parts)


def _module(name: str, known: dict[str, Path]) -> str | None:
    """The module that something stands in, or that it is."""
    parent = name.rpartition(".")[0]
    return name if name in known else parent if parent in known else None


def circle(edges: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, from one of them back to it; empty if there is none."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return error.args[1][::-1]
    return []


def folder(name: str) -> str | None:
    """The part of its ring that a module is in; None for the ring itself."""
    _, *inside = name.split(".")
    return inside[0] if inside else None


def folders_the_wrong_way(edges: dict[str, set[str]], ring: str) -> list[str]:
    order = (None, *FOLDERS[ring])
    return sorted(
        f"{name} imports {target}"
        for name, targets in edges.items()
        for target in targets
        if order.index(folder(target)) > order.index(folder(name))
    )


def test_no_modules_import_each_other_in_a_circle() -> None:
    edges = graph(ROOT, RINGS)
    assert {"attention.backbones.unet", "pipelines.methods.clora", "compose.cli", "ui"} <= edges.keys()
    assert {"attention", "attention.device"} <= edges["pipelines.denoising.denoiser"], "imports between rings are seen"
    assert circle(edges) == []


@pytest.mark.parametrize("ring", FOLDERS)
def test_every_module_is_in_a_folder(ring: str) -> None:
    edges = graph(ROOT, (ring,))
    assert [name for name in edges if folder(name) is None] == [ring]
    assert {folder(name) for name in edges} - {None} == set(FOLDERS[ring])


@pytest.mark.parametrize(
    ("ring", "name", "target"),
    [
        ("pipelines", "pipelines.denoising.loop", "pipelines.images.task"),
        ("compose", "compose.check.report", "compose.generate.making"),
    ],
)
def test_folders_import_those_before_them(ring: str, name: str, target: str) -> None:
    edges = graph(ROOT, (ring,))
    assert folders_the_wrong_way(edges, ring) == []
    assert target in edges[name]  # else imports are no longer recognised


@pytest.mark.parametrize(
    "statement",
    ["from lora_compose.compose.page import b", "def f():\n    from lora_compose.compose.page.b import x"],
)
def test_a_circle_and_a_wrong_folder_are_seen(tmp_path: Path, statement: str) -> None:
    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    write("compose/page/__init__.py", "")
    write("compose/page/a.py", "import torch\nimport lora_compose.compose.files.c\n")
    write("compose/page/b.py", "from lora_compose.compose.page.a import x\n")
    write("compose/files/c.py", "x = 1\n")
    edges = graph(tmp_path, ("compose",))
    assert (circle(edges), folders_the_wrong_way(edges, "compose")) == ([], [])
    write("compose/files/c.py", statement)
    edges = graph(tmp_path, ("compose",))
    names = circle(edges)
    assert names[0] == names[-1]
    assert set(names) == {"compose.page.a", "compose.page.b", "compose.files.c"}
    assert folders_the_wrong_way(edges, "compose") == ["compose.files.c imports compose.page.b"]


def test_inner_packages_do_not_import_outer_ones() -> None:
    assert arrows_the_wrong_way(ROOT) == []


def test_only_backbones_import_diffusers() -> None:
    users = {
        path.relative_to(ROOT).parent.as_posix()
        for ring, path in modules(ROOT)
        if ring == "attention" and any(name.split(".")[0] == "diffusers" for _, name in imported(path))
    }
    assert users == {"attention/backbones"}


LOADED = """
import sys

def show():
    print(*{name.split(".")[0] for name in sys.modules})

import lora_compose.attention
show()
from lora_compose.compose.comfyui import composition, concepts, families, files, memory, merging, refining
from lora_compose.compose.comfyui import needed, showing, steering, tokens, weights, words
show()
"""


@pytest.mark.slow  # of the nodes, which load the engine, `test_registry.py` asks it as well
def test_the_engine_and_the_nodes_load_nothing_of_diffusers() -> None:
    """Other programs have models of their own, and environments that stay as they are."""
    ran = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True, cwd=ROOT)
    engine, nodes = (set(line.split()) for line in ran.stdout.splitlines())
    assert {"torch", "diffusers", "transformers"} & engine == {"torch"}
    assert all(hasattr(attention, name) for name in attention.__all__)
    others = {"accelerate", "compel", "cv2", "diffusers", "huggingface_hub", "jinja2", "peft", "rich", "typer"}
    assert {"torch", "transformers", *others} & nodes == {"torch"}, "ComfyUI needs none of the others"


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
        ("attention", "import lora_compose.pipelines.denoising.denoiser"),
        ("attention", "from lora_compose import Concept"),
        ("attention", "def f():\n    from lora_compose.compose.cli import main"),
        ("attention", "if TYPE_CHECKING:\n    import torch, lora_compose.compose as c"),
        ("attention", "importlib.import_module('lora_compose.pipelines.denoising.denoiser')"),
        ("attention", "from attention.gates import Gates"),
        ("pipelines", "from lora_compose.compose import Scene"),
        ("compose", "import ui"),
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
