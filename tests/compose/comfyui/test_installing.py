"""The nodes are installed into a ComfyUI, and nothing of others is touched."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from commands import call, flat
from lora_compose.compose.comfyui.installing import FOLDER, install, uninstall

FILES = ("main.py", "nodes.py", "comfy/model_patcher.py", "comfy_api/latest/__init__.py")


@pytest.fixture
def comfyui(tmp_path: Path) -> Path:
    """A folder laid out as a checkout; nothing in it is run."""
    root = tmp_path / "ComfyUI"
    for name in FILES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "custom_nodes/another").mkdir(parents=True)
    return root


def everything(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*"))


def test_it_is_installed_again_and_removed_without_a_trace(comfyui: Path) -> None:
    before = everything(comfyui)
    call("comfyui", "install", comfyui)
    call("comfyui", "install", comfyui)
    folder = comfyui / "custom_nodes" / FOLDER
    assert sorted(path.name for path in folder.iterdir()) == ["__init__.py", "pyproject.toml"]
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__/__init__.cpython-311.pyc").touch()
    call("comfyui", "uninstall", comfyui)
    assert everything(comfyui) == before


def test_the_folder_finds_the_library_from_another_environment(comfyui: Path) -> None:
    """Up to what is needed of ComfyUI itself, which is not there."""
    code = install(comfyui) / "__init__.py"
    program = f"import asyncio, runpy; asyncio.run(runpy.run_path({str(code)!r})['comfy_entrypoint']())"
    ran = subprocess.run(
        [sys.executable, "-P", "-S", "-c", program],
        cwd=comfyui / "custom_nodes",
        env={"PATH": ""},
        capture_output=True,
        text=True,
    )
    assert "lora_compose/compose/comfyui/entry.py" in ran.stderr
    said = "lora-compose needs ComfyUI 0.3.64 or later: this one has no comfy.lora.model_lora_keys_unet; update ComfyUI"
    assert ran.stderr.rstrip().splitlines()[-1] == f"RuntimeError: {said}"


@pytest.mark.parametrize("name", FILES)
def test_a_folder_that_is_no_comfyui_is_refused(comfyui: Path, name: str) -> None:
    (comfyui / name).unlink()
    before = everything(comfyui)
    said = flat(call("comfyui", "install", comfyui, code=2).output)
    assert f"it has no {name}" in said
    assert everything(comfyui) == before


@pytest.mark.parametrize("change", [install, uninstall])
def test_a_folder_of_others_is_left_as_it_is(comfyui: Path, change: type) -> None:
    folder = comfyui / "custom_nodes" / FOLDER
    folder.mkdir()
    (folder / "__init__.py").write_text("theirs = 1\n")
    with pytest.raises(ValueError, match="not from lora-compose and is left as it is"):
        change(comfyui)
    assert runpy.run_path(str(folder / "__init__.py"))["theirs"] == 1


def test_files_that_others_have_put_there_stay(comfyui: Path) -> None:
    folder = install(comfyui)
    (folder / "mine.txt").write_text("mine")
    uninstall(comfyui)
    assert everything(folder) == ["mine.txt"]


def test_what_is_not_installed_cannot_be_removed(comfyui: Path) -> None:
    with pytest.raises(ValueError, match="not installed in this ComfyUI"):
        uninstall(comfyui)
