"""Paths of LoRAs, models and masks in scenes and runs: relative to a file, or valid on the whole machine."""

import os
import re
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from lora_compose.compose.playground.assets import PLAYGROUNDS, lora_source, playground_model
from lora_compose.compose.support.names import did_you_mean, file_near
from lora_compose.pipelines.scene.mask_images import IMAGE_SUFFIXES, URI_PREFIX
from lora_compose.pipelines.scene.scene import Run, Start
from lora_compose.pipelines.scene.sources import moved_files
from lora_compose.pipelines.support.home import expanded
from lora_compose.pipelines.support.quantising import QUANTISED

_PICKLES = (".ckpt", ".bin", ".pt")
INDEXES = ("model_index.json", "modular_model_index.json")
"""The index in a model's folder: of diffusers' pipelines, and of its modular pipelines."""
_FILES = (".safetensors", ".gguf", ".onnx", *_PICKLES, *IMAGE_SUFFIXES)
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

_Model = TypeVar("_Model", bound=BaseModel)
_Start = TypeVar("_Start", bound=Start)

Move = Callable[[str], str]
"""From a path, or a name that is kept, to where it is elsewhere."""


def free_path(path: Path) -> Path:
    """The path itself if nothing is there, else the first free one of "name-2", "name-3", ..."""
    numbered = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in count(2))
    # lexists: a link that leads nowhere is in the way, too
    return path if not os.path.lexists(path) else next(free for free in numbered if not os.path.lexists(free))


def is_hub_name(source: str) -> bool:
    """Whether a source reads as a repository on the hub ("user/my-cat-lora") and not as a file."""
    return bool(_HUB.fullmatch(source)) and not source.lower().endswith(_FILES)


class ModelError(ValueError):
    """A model that cannot be opened; the message says why and what was expected."""


def check_lora(source: str) -> None:
    """Raises ValueError if a LoRA does not exist on this machine; hub repositories are not looked up."""
    path = expanded(lora_source(source))
    pickled = path.suffix.lower() in _PICKLES  # refused whether they are there or not, with what to do instead
    if source and not pickled and not path.exists() and not is_hub_name(source):
        raise ValueError(f"there is no file {source!r}{file_near(path)}")


def model_source(model: str) -> Path:
    """The model that a run names: the playground's folder, a folder, a file, or a hub repository as if it were a path.

    Raises:
        ModelError: If there is no such model, or it is no model as diffusers saves it.
    """
    if model in PLAYGROUNDS:
        return playground_model(model)
    path = expanded(model)
    if path.suffix.lower() == ".gguf":
        raise ModelError(
            f"{model!r} is one quantised denoiser, not a whole model; name the model that it is of, a folder or hub "
            f"repository, and --quantize {model}"
        )
    if path.is_file() and path.suffix.lower() != ".safetensors":
        raise ModelError(f"{model!r}: a model in one file must be .safetensors; a pickle could run code when opened")
    if path.is_dir() and not any((path / name).is_file() for name in INDEXES):
        raise ModelError(f"the folder {model!r} has no {INDEXES[0]}; expected a model as diffusers saves it")
    if not path.exists() and not is_hub_name(model):
        raise ModelError(
            f"there is no model {model!r}{_model_near(path)}; expected {', '.join(PLAYGROUNDS)}, a folder as diffusers "
            "saves it, a .safetensors file, or a hub repository such as stable-diffusion-v1-5/stable-diffusion-v1-5"
        )
    return path


def _model_near(path: Path) -> str:
    return did_you_mean(path.name, PLAYGROUNDS) or file_near(path)


def local_source(source: str, base: Path) -> str:
    """A source as a file in the folder `base` names it: names stay, and relative paths begin at that folder."""
    path = expanded(source)
    if is_named(source) or (is_hub_name(source) and not (base / path).exists()):
        return source
    return str(base / path)  # an absolute path stays what it is


def located(model: _Model, path: Path) -> _Model:
    """A scene or run with relative paths made absolute; they are relative to its file."""
    base = path.parent.absolute()
    return moved(model, lambda source: local_source(source, base))


def moved(model: Any, move: Move) -> Any:
    """A scene or run with every path changed by a function."""
    if isinstance(model, Run):
        files = {"model": move(model.model), "quantize": moved_weights(model.quantize, move)}
        return model.model_copy(update={**files, "scene": moved(model.scene, move)})
    concepts = tuple(
        _moved(concept, ("region",), move).model_copy(update={"lora": moved_files(concept.lora, move)})
        for concept in model.concepts
    )
    return moved_start(model, move).model_copy(update={"concepts": concepts})


def moved_weights(quantize: str | None, move: Move) -> str | None:
    """What a model is opened with in fewer bits, moved if it is a file."""
    return quantize if quantize is None or quantize in QUANTISED else move(quantize)


def moved_start(model: _Start, move: Move) -> _Start:
    """A scene, of any kind, with the paths of its images and of the models that read them moved."""
    controls = tuple(_moved(guide, ("model", "image"), move) for guide in model.controls)
    adapters = tuple(_moved(guide, ("model", "image", "region"), move) for guide in model.ip_adapters)
    start = _moved(model, ("image", "mask_image"), move)
    references = tuple(map(move, model.references))
    return start.model_copy(update={"references": references, "controls": controls, "ip_adapters": adapters})


def _moved(model: _Model, names: tuple[str, ...], move: Move) -> _Model:
    """A model with the paths in some fields moved; masks given as text are no paths."""
    given = {name: getattr(model, name) for name in names}
    paths = {
        name: value for name, value in given.items() if isinstance(value, str) and not value.startswith(URI_PREFIX)
    }
    return model.model_copy(update={name: move(path) for name, path in paths.items()})


def to_file(source: str, base: Path) -> str:
    """A source as a file in the folder `base` writes it: relative if it is below that folder."""
    full = to_record(source)
    path = expanded(full)
    if full == source and not path.is_absolute():  # a name, not a path
        return source
    if not path.is_relative_to(base):
        return full
    relative = path.relative_to(base).as_posix()
    return f"./{relative}" if is_hub_name(relative) or is_named(relative) else relative


def to_record(source: str) -> str:
    """A path that is valid from everywhere on this machine, without the name of the user."""
    path = expanded(source)
    if is_named(source) or (is_hub_name(source) and not path.exists()):
        return source
    path, home = path.absolute(), Path.home()
    return f"~/{path.relative_to(home).as_posix()}" if path != home and path.is_relative_to(home) else str(path)


def is_named(source: str) -> bool:
    """Whether a source is the name of something that comes with lora-compose."""
    return source.partition(":")[0] in PLAYGROUNDS
