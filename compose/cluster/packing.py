"""Files of this machine on nodes that share no folder with it: packed here, unpacked there.

Contents travel through a store, such as Ray's object store; a parcel has references to them only.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lora_compose.compose.files.atomic import write_whole
from lora_compose.compose.files.paths import is_hub_name, is_named, moved
from lora_compose.compose.generate.facts import digest, file_hash
from lora_compose.compose.generate.making import Made
from lora_compose.pipelines.concepts.finding import find_file
from lora_compose.pipelines.formats.files import PEFT_CONFIG, PEFT_FILE
from lora_compose.pipelines.scene.scene import Run, Scene
from lora_compose.pipelines.scene.sources import files_of
from lora_compose.pipelines.support.home import expanded

_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".h5", ".msgpack", ".onnx")
"""Weights that are not sent where a folder has them as safetensors, which are preferred."""


@dataclass(frozen=True)
class Parcel:
    """Files that a node needs: references to contents by path below its folder, and those paths by source."""

    files: Mapping[str, Any] = field(default_factory=dict)
    moves: Mapping[str, str] = field(default_factory=dict)


class Packer:
    """Packs files; the same content is stored once, by `put`, which returns a reference to it."""

    def __init__(self, put: Callable[[Path], Any]) -> None:
        self._put = put
        self._references: dict[str, Any] = {}

    def source(self, source: str) -> Parcel:
        """An image, or the file or folder of a model; nothing of what is on the hub or comes with lora-compose."""
        path = expanded(source)
        if is_named(source) or not path.exists():
            return Parcel()
        if path.is_file():
            return self.together(source, path.parent, [path], path)
        inside = [file for file in sorted(path.rglob("*")) if file.is_file()]
        safe = {file.parent for file in inside if file.suffix == ".safetensors"}
        return self.together(source, path, [f for f in inside if f.suffix not in _PICKLES or f.parent not in safe])

    def lora(self, source: str) -> Parcel:
        """A LoRA file, with PEFT's settings beside it."""
        if is_named(source) or (is_hub_name(source) and not Path(source).exists()):
            return Parcel()
        path = find_file(source)
        beside = path.with_name(PEFT_CONFIG)
        files = [path, *([beside] if path.stem == PEFT_FILE and beside.is_file() else [])]
        return self.together(source, path.parent, files, path)

    def named_by(self, named: Run | Scene) -> Parcel:
        """Everything that a run or a scene names: its model, LoRAs, images, and the models that read images."""
        scene = named.scene if isinstance(named, Run) else named
        loras = {file for concept in scene.concepts for file in files_of(concept.lora)}
        packed: list[Parcel] = []

        def pack(source: str) -> str:
            packed.append(self.lora(source) if source in loras else self.source(source))
            return source

        moved(named, pack)
        return union(packed)

    def together(self, source: str, folder: Path, files: Iterable[Path], main: Path | None = None) -> Parcel:
        """Files that lie in a folder, as they do in one of the node; `source` names `main`, or the folder itself."""
        inside = {file.relative_to(folder).as_posix(): file for file in files}
        name = f"files/{digest([[path, file_hash(str(file))] for path, file in inside.items()])}"
        there = name if main is None else f"{name}/{main.relative_to(folder).as_posix()}"
        return Parcel({f"{name}/{path}": self._reference(file) for path, file in inside.items()}, {source: there})

    def _reference(self, path: Path) -> Any:
        sha256 = file_hash(str(path))
        if sha256 not in self._references:
            self._references[sha256] = self._put(path)
        return self._references[sha256]


def union(parcels: Iterable[Parcel]) -> Parcel:
    """One parcel with the files of all."""
    files: dict[str, Any] = {}
    moves: dict[str, str] = {}
    for parcel in parcels:
        files |= parcel.files
        moves |= parcel.moves
    return Parcel(files, moves)


class Node:
    """The files of a node, written into a folder; `get` gives the content of a reference."""

    def __init__(self, folder: Path, get: Callable[[Any], np.ndarray]) -> None:
        self.folder, self._get = folder, get
        self._sources: dict[str, str] = {}

    def unpack(self, parcel: Parcel) -> Callable[[str], str]:
        """Writes the files of a parcel unless they are there already; returns where a source is on this node."""
        for name, reference in parcel.files.items():
            if not (path := self.folder / name).exists():
                write_whole(path, self._get(reference).tofile)
        here = {source: str(self.folder / name) for source, name in parcel.moves.items()}
        self._sources |= {path: source for source, path in here.items()}
        return lambda source: here.get(source, source)

    def as_given(self, text: str) -> str:
        """A message with the sources that the user has named, in place of the paths of this node."""
        for path in sorted(self._sources, key=len, reverse=True):
            text = text.replace(path, self._sources[path])
        return text


THIS_MACHINE = Node(Path(), np.asarray)
"""A node that has all files already: nothing is packed for it."""


def named_as(made: Made, run: Run) -> Made:
    """An image whose record names model and files as a run does."""
    renamed = made.record.run.model_copy(update={"scene": run.scene, "model": run.model})
    return Made(made.image, made.record.model_copy(update={"run": renamed}))
