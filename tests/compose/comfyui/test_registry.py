"""The clone is a node pack as ComfyUI's registry and ComfyUI Manager take it, which adds no package to ComfyUI."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import pytest

from lora_compose.compose.comfyui import installing
from lora_compose.compose.comfyui.needed import OLDEST
from pairs import slow_but

ROOT = Path(__file__).resolve().parents[3]
NODES = ("Concept", "Boxes", "Compose", "DraftPreview", "Refine", "Merge", "Inspect")


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
    assert oldest == OLDEST


def test_comfyui_manager_installs_no_package() -> None:
    """ComfyUI Manager runs such files where they exist; the nodes need no package that ComfyUI does not need."""
    assert not [name for name in ("requirements.txt", "install.py") if (ROOT / name).exists()]


def tracked(*options: str) -> list[str]:
    """Files that git tracks."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", *options]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")[:-1]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the registry's command (`comfy node publish`) uploads: what git tracks, without what .comfyignore names."""
    if not (ROOT / ".git").exists():
        pytest.skip("the registry's archive is made in a clone")
    path = tmp_path_factory.mktemp("registry") / "node.zip"
    left_out = {*tracked("--cached", "--ignored", "--exclude-from=.comfyignore")}
    with ZipFile(path, "w", ZIP_DEFLATED) as file:
        for name in tracked():
            if name not in left_out:
                file.write(ROOT / name, name)  # a link to a folder becomes an empty folder there, too
    return path


@pytest.fixture(scope="module", params=["archive", *slow_but((), ["links", "text files"])])
def installed(archive: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """The folder that ComfyUI Manager makes of it; or a clone, with links or the text files git makes of them."""
    folder = tmp_path_factory.mktemp("ComfyUI") / "custom_nodes/lora-compose"
    ZipFile(archive).extractall(folder)
    if request.param != "archive":
        for empty in [path for path in (folder / "lora_compose").iterdir() if path.is_dir()]:
            empty.rmdir()
            target = f"../{empty.name}"
            empty.symlink_to(target) if request.param == "links" else empty.write_text(target, encoding="utf-8")
    return folder


def test_the_archive_has_the_code_and_what_it_is_under_alone(archive: Path) -> None:
    names = ZipFile(archive).namelist()
    code, folders = {"lora_compose", "attention", "pipelines", "compose"}, {name for name in names if name[-1] == "/"}
    assert {name.partition("/")[0] for name in names} == code | {
        "__init__.py", "pyproject.toml", "LICENSE", "NOTICE", "README.md"
    }  # fmt: skip
    assert folders == {f"lora_compose/{name}/" for name in ("attention", "pipelines", "compose")}
    assert archive.stat().st_size < 2 * 2**20


def ran(folder: Path, *further: str, before: str = "", after: str = "") -> str:
    """What a program prints that imports a folder's nodes, where no other lora_compose can be imported."""
    here = [path for path in sys.path if path and not (Path(path) / "lora_compose").exists()]
    program = f"import asyncio, sys\nsys.path += {[*further, *here]}\n{before}\n{after}"
    options = {"capture_output": True, "text": True, "cwd": folder.parent, "env": {"PATH": os.environ["PATH"]}}
    found = subprocess.run([sys.executable, "-P", "-S", "-c", program], **options)
    assert found.returncode == 0, found.stderr
    return found.stdout


STAND_INS = """
from importlib.util import module_from_spec, spec_from_file_location
from unittest.mock import MagicMock

for name in ("comfy", "comfy.lora", "comfy.model_management", "comfy.model_patcher", "comfy.patcher_extension",
             "comfy.samplers", "comfy.sd", "comfy_api", "comfy_api.latest", "folder_paths", "nodes"):
    sys.modules[name] = MagicMock()
sys.modules["comfy_api.latest"].ComfyExtension = sys.modules["comfy_api.latest"].io.ComfyNode = object
"""
"""Modules of ComfyUI in whose place anything can be imported."""


def test_the_nodes_are_imported_from_the_archive_or_a_clone_alone(installed: Path) -> None:
    """With stand-ins for ComfyUI's modules: all that ours import is there, and is not that of this clone.

    Of other packages they load those that ComfyUI has, whose environment stays as it is.
    """
    said = ran(
        installed,
        before=STAND_INS,
        after=f"""
spec = spec_from_file_location("pack", {str(installed / "__init__.py")!r})
pack = module_from_spec(spec)
spec.loader.exec_module(pack)
print(*[node.__name__ for node in asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list())])
print(*{{name.partition(".")[0] for name in sys.modules}})
print(*{{module.__file__ for name, module in sys.modules.items() if name.startswith("lora_compose.")}}, sep="\\n")
""",
    ).splitlines()
    assert said[0].split() == [f"{name}Node" for name in NODES]
    others = {"accelerate", "compel", "cv2", "diffusers", "huggingface_hub", "jinja2", "peft", "rich", "typer"}
    assert {"torch", "transformers", *others} & {*said[1].split()} == {"torch"}, "ComfyUI needs none of the others"
    assert len(said) > 20
    assert all(Path(path).is_relative_to(installed) for path in said[2:])


@pytest.mark.comfyui
def test_comfyui_loads_the_nodes_from_the_archive_or_a_clone_alone(installed: Path) -> None:
    said = ran(
        installed,
        os.environ["COMFYUI_PATH"],
        before="from comfy.cli_args import args\nargs.cpu = True\nimport nodes",
        after=f"""
print(asyncio.run(nodes.load_custom_node({str(installed)!r})))
ours = [node for name, node in nodes.NODE_CLASS_MAPPINGS.items() if name.startswith("LoraCompose")]
print(*[node.__name__ for node in ours])
print(*{{node.CATEGORY for node in ours}}, sys.modules["lora_compose"].__file__)
""",
    ).splitlines()
    assert said[-3:-1] == ["True", " ".join(f"{name}Node" for name in NODES)]
    assert said[-1] == f"lora-compose {installed / 'lora_compose/__init__.py'}"


@pytest.mark.comfyui
def test_comfyui_reads_the_same_fields(settings: dict[str, Any]) -> None:
    import comfy_models  # noqa: F401, I001  # puts ComfyUI on the path
    from comfy_config.config_parser import extract_node_configuration  # pyright: ignore[reportMissingImports]

    found, project = extract_node_configuration(str(ROOT)), settings["project"]
    assert (found.project.name, found.project.version) == (project["name"], project["version"])
    assert found.project.license.text == project["license"]
    assert found.project.supported_os == ["OS Independent"]
    assert found.project.supported_comfyui_version == settings["tool"]["comfy"]["requires-comfyui"]
    assert found.tool_comfy.display_name == settings["tool"]["comfy"]["DisplayName"]
