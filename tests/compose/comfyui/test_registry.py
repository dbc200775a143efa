"""The clone is a node pack as ComfyUI's registry and ComfyUI Manager take it, which adds no package to ComfyUI."""

import asyncio
import re
import subprocess
import sys
import tomllib
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

from lora_compose.compose.comfyui import installing

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_fields_are_there_and_agree_with_the_package(settings: dict[str, Any], tmp_path: Path) -> None:
    """As the registry wants them: a name of letters first, a version of three numbers; unknown fields are misspelt."""
    project, comfy = settings["project"], settings["tool"]["comfy"]
    assert comfy.keys() == {"PublisherId", "DisplayName", "requires-comfyui"}
    assert re.fullmatch(r"[a-z](-?[a-z0-9])*", project["name"])
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert comfy["DisplayName"] == project["name"]
    for name in ("description", "requires-python", "license"):
        assert project[name]
    assert "Operating System :: OS Independent" in project["classifiers"]
    for name in ("main.py", "nodes.py", "comfy/model_patcher.py", "comfy_api/latest/__init__.py", "custom_nodes/_"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    installed = tomllib.loads((installing.install(tmp_path) / "pyproject.toml").read_text(encoding="utf-8"))
    assert installed["tool"]["comfy"]["DisplayName"] == comfy["DisplayName"]


def test_the_oldest_comfyui_is_the_one_that_the_guide_and_the_installer_name(settings: dict[str, Any]) -> None:
    oldest = settings["tool"]["comfy"]["requires-comfyui"].removeprefix(">=")
    assert f"version {oldest} or later" in (ROOT / "docs/comfyui.md").read_text(encoding="utf-8")
    assert f"version {oldest} or later" in Path(installing.__file__).read_text(encoding="utf-8")


def test_comfyui_manager_installs_no_package() -> None:
    """ComfyUI Manager runs such files where they exist; the nodes need no package that ComfyUI does not need."""
    assert not [name for name in ("requirements.txt", "install.py") if (ROOT / name).exists()]


def test_a_clone_in_custom_nodes_is_imported_also_with_links_as_empty_folders(tmp_path: Path) -> None:
    """Up to the import of ComfyUI itself, which is not there; the registry's archives have no links."""
    clone = tmp_path / "custom_nodes/lora-compose"
    (clone / "lora_compose").mkdir(parents=True)
    for name in ("attention", "pipelines", "compose"):
        (clone / name).symlink_to(ROOT / name)
        (clone / "lora_compose" / name).mkdir()
    for name in ("__init__.py", "lora_compose/__init__.py"):
        (clone / name).write_bytes((ROOT / name).read_bytes())
    program = (
        "import asyncio, importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('pack', {str(clone / '__init__.py')!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "asyncio.run(module.comfy_entrypoint())\n"
    )
    ran = subprocess.run(
        [sys.executable, "-P", "-S", "-c", program], env={"PATH": ""}, capture_output=True, text=True, cwd=tmp_path
    )
    assert str(clone / "compose/comfyui/nodes.py") in ran.stderr
    assert ran.stderr.rstrip().splitlines()[-1] == "ModuleNotFoundError: No module named 'comfy'"


@pytest.mark.comfyui
def test_comfyui_loads_the_nodes_of_a_clone() -> None:
    import comfy_models  # noqa: F401  # puts ComfyUI on the path

    spec = spec_from_file_location("pack", ROOT / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    nodes = asyncio.run(asyncio.run(module.comfy_entrypoint()).get_node_list())
    assert len(nodes) == 7
    assert {node.GET_SCHEMA().category for node in nodes} == {"lora-compose"}


@pytest.mark.comfyui
def test_comfyui_reads_the_same_fields(settings: dict[str, Any]) -> None:
    from comfy_config.config_parser import extract_node_configuration  # pyright: ignore[reportMissingImports]

    import comfy_models  # noqa: F401  # puts ComfyUI on the path

    found, project = extract_node_configuration(str(ROOT)), settings["project"]
    assert (found.project.name, found.project.version) == (project["name"], project["version"])
    assert found.project.license.text == project["license"]
    assert found.project.supported_os == ["OS Independent"]
    assert found.project.supported_comfyui_version == settings["tool"]["comfy"]["requires-comfyui"]
    assert found.tool_comfy.display_name == settings["tool"]["comfy"]["DisplayName"]
