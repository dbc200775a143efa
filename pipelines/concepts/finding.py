"""Where a LoRA file is: a path, a folder or a hub repository."""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import constants, hf_hub_download, list_repo_files
from huggingface_hub.errors import EntryNotFoundError

from lora_compose.pipelines.formats.files import PEFT_CONFIG, PEFT_FILE, PICKLES, LoraError, refuse_format
from lora_compose.pipelines.support.home import expanded
from lora_compose.pipelines.support.hub import asking, cached_folder, is_hub_name, reachable


def local_path(source: str | os.PathLike[str]) -> Path:
    """A path as written, with the home folder for "~"; raises LoraError if it cannot be a path."""
    if not isinstance(source, str | os.PathLike) or not str(source):
        raise LoraError(
            f"{source!r} names no LoRA; expected a file, a folder or a hub repository such as 'user/my-cat'"
        )
    return expanded(source)


def find_file(source: str | os.PathLike[str], weight_name: str | None = None, **hub: Any) -> Path:
    """The file behind a path, a folder or a hub repository.

    Args:
        source: A file, a folder, or a repository such as "user/my-cat-lora".
        weight_name: The file inside a folder or repository; not needed if there is only one safetensors file.
        hub: Passed on to `huggingface_hub` (token, revision, cache_dir, local_files_only, ...).

    Raises:
        LoraError: If there is no such file, several and none is named, or the model hub does not give it.
    """
    path = local_path(source)
    if path.is_dir():
        names = sorted(file.name for file in path.glob("*.safetensors"))
        return path / _only(names, weight_name, path)
    if path.exists():
        if weight_name not in (None, path.name):
            raise LoraError(f"{path} is a file, not a folder with a {weight_name}: leave out weight_name")
        return path
    is_file = path.is_absolute() or path.suffix.lower() in {".safetensors", *PICKLES}
    if is_file or not is_hub_name(str(source)):
        refuse_format(path)
        raise LoraError(f"there is no file {str(source)!r}")
    try:
        hub = reachable(str(source), *([weight_name] if weight_name else []), **hub)
        with asking(str(source), **hub):
            return _downloaded(str(source), weight_name, hub)
    except OSError as error:
        raise LoraError(str(error)) from error


def _downloaded(repository: str, weight_name: str | None, hub: Mapping[str, Any]) -> Path:
    if weight_name is None and (constants.HF_HUB_OFFLINE or hub.get("local_files_only")):
        folder = cached_folder(repository, **hub)
        names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.safetensors"))]
    elif weight_name is None:
        access = {option: hub[option] for option in ("revision", "token") if option in hub}
        names = [name for name in list_repo_files(repository, **access) if name.endswith(".safetensors")]
    else:
        names = [weight_name]
    name = _only(names, weight_name, repository)
    path = Path(hf_hub_download(repository, name, **hub))
    if path.stem == PEFT_FILE:
        with suppress(EntryNotFoundError):  # if it is missing, matching the file reports it
            hf_hub_download(repository, str(PurePosixPath(name).with_name(PEFT_CONFIG)), **hub)
    return path


def _only(names: list[str], wanted: str | None, place: object) -> str:
    if wanted is not None:
        if wanted in names:
            return wanted
        raise LoraError(f"{place} has no {wanted!r}; it has {', '.join(names) or 'no safetensors files'}")
    if not names:
        raise LoraError(f"{place} has no safetensors files")
    if len(names) != 1:
        listed = ", ".join(names)
        raise LoraError(
            f"{place} has {len(names)} safetensors files; name one of them, as a file or by weight_name: {listed}"
        )
    return names[0]
