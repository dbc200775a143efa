"""The library has one import name, and gets along with projects whose folders are called like parts of it."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import lora_compose

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("attention", "pipelines", "compose")
RECIPE = Path("assets/recipe")
USE = """
import attention, pipelines, compose
from lora_compose import Clora, ComposePipeline, Concept, LoraComposer
from lora_compose.compose.playground.assets import playground_model
assert {attention.WHOSE, pipelines.WHOSE, compose.WHOSE} == {"theirs"}
pipe = ComposePipeline.from_pretrained(playground_model())
print(type(pipe).__module__, pipe("a cat", num_inference_steps=1, output_type="latent").images.shape[0])
"""


def run_in_a_project(folder: Path, library: Path, use: str = USE) -> str:
    """What a use of the library prints in a project that has folders of these names."""
    for part in PARTS:
        (folder / part).mkdir(parents=True)
        (folder / part / "__init__.py").write_text("WHOSE = 'theirs'\n", encoding="utf-8")
    (folder / "use.py").write_text(use, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(library)}
    ended = subprocess.run(
        [sys.executable, "use.py"], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.slow
def test_a_project_with_folders_of_these_names_can_use_the_library(tmp_path: Path) -> None:
    assert run_in_a_project(tmp_path, ROOT).split() == ["lora_compose.pipelines.families.stable_diffusion", "1"]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone as git on Windows checks it out: links are text files that hold where they lead."""
    package = tmp_path / "clone/lora_compose"
    package.mkdir(parents=True)
    for path in (ROOT / "lora_compose").iterdir():
        if path.is_symlink():
            (package / path.name).write_text(path.readlink().as_posix(), encoding="utf-8")
        elif path.is_file():
            shutil.copy(path, package)
    for part in PARTS:
        shutil.copytree(ROOT / part, package.parent / part, ignore=shutil.ignore_patterns("__pycache__"))
    (package.parent / "assets").symlink_to(ROOT / "assets")
    assert (package / "compose").read_text(encoding="utf-8") == "../compose"
    return package.parent


LOOK = f"""
from importlib.util import find_spec
import attention, pipelines, compose
from lora_compose.compose.playground.assets import playground_model
assert {{attention.WHOSE, pipelines.WHOSE, compose.WHOSE}} == {{"theirs"}}
print(playground_model())
print(*(find_spec(f"lora_compose.{{part}}").origin for part in {PARTS}), sep="\\n")
"""


@pytest.mark.parametrize("links", [True, False])
def test_a_project_with_folders_of_these_names_finds_all_of_the_library_under_one_name(
    clone: Path, tmp_path: Path, links: bool
) -> None:
    """Also in a clone whose links are text files; what imports what is in `test_imports.py`."""
    library = ROOT if links else clone
    found = run_in_a_project(tmp_path / "project", library, LOOK).split()
    model, *origins = (Path(path).resolve() for path in found)
    assert (model / "model_index.json").is_file()
    assert origins == [library / part / "__init__.py" for part in PARTS]


@pytest.mark.slow
def test_a_clone_whose_links_are_text_files_works_in_such_a_project(clone: Path, tmp_path: Path) -> None:
    assert "stable_diffusion 1" in run_in_a_project(tmp_path / "project", clone)


def files_of(part: str) -> set[Path]:
    """The files of one of the three folders, relative to the root."""
    found = (path.relative_to(ROOT) for path in (ROOT / part).rglob("*") if path.is_file())
    return {path for path in found if "__pycache__" not in path.parts}


@pytest.mark.slow
def test_the_wheel_has_one_name_all_but_the_recipe_and_works_in_such_a_project(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    names = {path.name for path in (tmp_path / "site").iterdir()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"lora_compose"}
    site = tmp_path / "site/lora_compose"
    assert (site / "py.typed").is_file()
    needed = {path for part in PARTS for path in files_of(part)}
    assert len(needed) > 100
    assert {path for path in needed if not (site / path).is_file()} == set()
    assert not (site / "compose" / RECIPE).exists()
    assert "stable_diffusion 1" in run_in_a_project(tmp_path / "project", tmp_path / "site")
    for command in ("demo", "run"):
        told = [sys.executable, "-m", "lora_compose", command, "--help"]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
        ended = subprocess.run(told, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        assert f"lora_compose {command} [OPTIONS]" in ended.stdout


def test_what_the_package_exports_is_there() -> None:
    assert sorted(lora_compose.__all__, key=str) == sorted(set(lora_compose.__all__), key=str)
    assert all(hasattr(lora_compose, name) for name in lora_compose.__all__)


def test_every_name_of_the_documentation_is_exported() -> None:
    """In examples: what is imported from the package, and methods and types that are called."""
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))]
    code = "\n".join(block for text in texts for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    imported = {name.strip() for line in re.findall(r"from lora_compose import (.*)", code) for name in line.split(",")}
    called = set(re.findall(r"\b(Clora|LoraComposer|Tara|Regional|Merge|Switch|Composite|Concept|Control)\(", code))
    assert imported
    assert called
    assert imported | called <= set(lora_compose.__all__)
