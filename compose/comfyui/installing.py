"""The folder in ComfyUI's custom_nodes that imports our nodes."""

from importlib.util import find_spec
from pathlib import Path

from lora_compose.compose.comfyui.needed import OLDEST
from lora_compose.compose.support.version import __version__

FOLDER = "lora_compose_nodes"
_OURS = "# Written by lora-compose comfyui install; removed by lora-compose comfyui uninstall.\n"
_CORE = ("main.py", "nodes.py", "comfy/model_patcher.py", "comfy_api/latest/__init__.py")


def install(comfyui: Path) -> Path:
    """Writes the folder, or writes it anew; ComfyUI loads it at its next start.

    Raises:
        ValueError: If there is no ComfyUI with nodes of the kind of ours, or the folder is somebody else's.
    """
    folder = _folder(comfyui)
    # ComfyUI may run in another environment, where this one has been put on the path.
    spec = find_spec("lora_compose")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).resolve().parents[1]
    code = (
        f"{_OURS}import importlib.util\nimport sys\n\nif importlib.util.find_spec('lora_compose') is None:\n"
        f"    sys.path.append({str(source)!r})\n\n"
        "from lora_compose.compose.comfyui.entry import comfy_entrypoint\n\n__all__ = ['comfy_entrypoint']\n"
    )
    about = (
        f'{_OURS}[project]\nname = "lora-compose-nodes"\nversion = "{__version__}"\n'
        'description = "Several concept LoRAs in one image, each with its own identity"\n\n'
        '[tool.comfy]\nDisplayName = "lora-compose"\n'
    )
    folder.mkdir(exist_ok=True)
    (folder / "__init__.py").write_text(code, encoding="utf-8")
    (folder / "pyproject.toml").write_text(about, encoding="utf-8")
    return folder


def uninstall(comfyui: Path) -> Path:
    """Removes what `install` has written, and its folder if that is empty. Raises ValueError if it is not there."""
    folder = _folder(comfyui)
    if not folder.exists():
        raise ValueError(f"there is no {folder}; lora-compose is not installed in this ComfyUI")
    for name in ("__init__.py", "pyproject.toml"):
        (folder / name).unlink(missing_ok=True)
    for compiled in folder.glob("__pycache__/__init__.*.pyc"):
        compiled.unlink()
    for empty in (folder / "__pycache__", folder):
        if empty.exists() and not any(empty.iterdir()):
            empty.rmdir()
    return folder


def _folder(comfyui: Path) -> Path:
    missing = [name for name in _CORE if not (comfyui / name).is_file()]
    if missing:
        raise ValueError(
            f"{comfyui} is not a ComfyUI that can run these nodes: it has no {missing[0]}; give the folder that has "
            f"main.py and custom_nodes, of version {OLDEST} or later"
        )
    if not (comfyui / "custom_nodes").is_dir():
        raise ValueError(f"{comfyui} has no folder custom_nodes; give the folder that has main.py and custom_nodes")
    folder = comfyui / "custom_nodes" / FOLDER
    if folder.is_symlink() or (folder.exists() and not _is_ours(folder)):
        raise ValueError(f"{folder} is not from lora-compose and is left as it is; move it away")
    return folder


def _is_ours(folder: Path) -> bool:
    code = folder / "__init__.py"
    return folder.is_dir() and code.is_file() and code.read_text(encoding="utf-8", errors="replace").startswith(_OURS)
