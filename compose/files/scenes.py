"""Scene files, YAML or JSON.

Files are not trusted: sizes are limited, nothing is executed, and every error names the file, the position in it, what
was expected and what was found.
"""

import json
import os
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from lora_compose.compose.files.atomic import write_whole
from lora_compose.compose.files.paths import located, moved, to_file
from lora_compose.compose.files.reading import FileError
from lora_compose.compose.files.text import is_json, parse_file, to_yaml
from lora_compose.compose.files.validation import validated
from lora_compose.pipelines.scene.scene import Scene

_Model = TypeVar("_Model", bound=BaseModel)


def read_scene(path: str | Path) -> Scene:
    """Reads a scene, YAML or JSON, in which LoRAs are relative to the file. Raises FileError if it is none."""
    return located(read_as(Scene, path), Path(path))


def read_as(kind: type[_Model], path: str | Path) -> _Model:
    """Reads a YAML or JSON file as a model, paths as they are. Raises FileError if it is missing or not valid."""
    path = Path(path)
    return validated(kind, parse_file(path), str(path))


def write_scene(scene: Scene, path: str | Path, *, overwrite: bool = False) -> None:
    """Writes a scene file, YAML or JSON by its suffix. LoRAs below the file's folder become relative paths.

    Raises:
        FileError: If the file exists and is not to be overwritten, or for other suffixes.
    """
    path = Path(path)
    as_json = is_json(path)
    if os.path.lexists(path) and not overwrite:  # also a link that leads nowhere
        raise FileError(f"{path} exists already; choose another name")
    folder = path.parent.absolute()
    data = moved(scene, lambda source: to_file(source, folder)).model_dump(mode="json", exclude_none=True)
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n" if as_json else to_yaml(data)
    write_whole(path, text.encode())
