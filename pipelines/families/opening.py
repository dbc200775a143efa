"""Looks into a checkpoint before the model is opened."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import load_single_file_checkpoint
from diffusers.modular_pipelines import ModularPipeline
from safetensors import safe_open

_FILE_OPTIONS = ("force_download", "proxies", "token", "cache_dir", "local_files_only", "revision", "disable_mmap")


def checkpoint_keys(link_or_path: str | Path, options: Mapping[str, Any]) -> list[str]:
    """The names of the tensors in a checkpoint.

    Args:
        link_or_path: A file, or a link to one in a hub repository, which is downloaded.
        options: Those of `from_single_file`.
    """
    path = Path(link_or_path)
    if path.is_file() and path.suffix.lower() == ".safetensors":
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    given = {name: options[name] for name in _FILE_OPTIONS if name in options}
    return list(load_single_file_checkpoint(str(link_or_path), **given))


def configuration(source: str, **options: Any) -> Mapping[str, Any]:
    """What `model_index.json` says of a folder or repository, or else `modular_model_index.json`.

    Raises:
        OSError: If there is neither; the message is about the first.
    """
    try:
        return DiffusionPipeline.load_config(source, **options)  # pyright: ignore[reportReturnType]
    except OSError:
        try:
            return ModularPipeline.load_config(source, **options)  # pyright: ignore[reportReturnType]
        except OSError:
            pass
        raise
