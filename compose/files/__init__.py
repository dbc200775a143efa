"""Scene and run files, and pictures that say how they were made.

Scene files and pictures come from strangers: sizes are limited, nothing is executed, and every complaint names the
file, the place in it, what was expected and what was found.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Self, TypeVar, get_args

import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lora_compose.compose.files.atomic import write_new, write_whole
from lora_compose.pipelines.regular import open_regular
from lora_compose.pipelines.scene import Concept, Run, Scene

PLAYGROUND = "playground"
PLAYGROUND_TITLE = f"lora-compose {PLAYGROUND}"  # what LoRAs that were trained on it say in their metadata
RECORD_KEY = "lora-compose"

_MIB = 2**20
_TEXT_LIMIT = _MIB  # bytes of a scene or run file
_RECORD_LIMIT = 8 * _MIB  # characters; a scene file of the largest size fits, whatever its letters
_PICTURE_LIMIT = 256 * _MIB  # bytes of a picture file
_PIXEL_LIMIT = 64 * _MIB
_FILES = (".safetensors", ".ckpt", ".bin", ".pt", ".png", ".jpg", ".jpeg", ".webp", ".bmp")
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

_Model = TypeVar("_Model", bound=BaseModel)


class FileError(ValueError):
    """A file that cannot be read or written as asked; the message says where, what was expected and what was found."""


class Machine(BaseModel):
    """Where a picture was made.

    Attributes:
        device: As torch names it: "cpu", "cuda:0".
        name: Which processor that is.
        threads: Threads that torch computed with on the CPU.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str
    name: str
    threads: Annotated[int, Field(gt=0)]


class Record(BaseModel):
    """All that a picture says about how it was made.

    Attributes:
        run: What was asked for, with the method, scheduler and device that were used.
        versions: Of lora-compose, python, torch, diffusers and transformers.
        sha256: Of the LoRA files, by concept.
        machine: Where it was made.
        batch: The seeds of all pictures that were made in one call with this one, in order; empty if it was made alone.
            Bits depend on it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: Run
    versions: Mapping[str, str]
    sha256: Mapping[str, Annotated[str, Field(pattern="^[0-9a-f]{64}$")]]
    machine: Machine
    batch: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**63)], ...], Field(max_length=64)] = ()

    @model_validator(mode="after")
    def _in_its_batch(self) -> Self:
        if self.batch and self.run.seed not in self.batch:
            raise ValueError(f"the seed {self.run.seed} is not among those of its batch {list(self.batch)}")
        return self


def read_scene(path: str | Path) -> Scene:
    """Reads a scene file, YAML or JSON. Relative paths of LoRAs in it are relative to the file.

    Raises:
        FileError: If it is missing, unreadable or says something else than a scene.
    """
    return _located(read_as(Scene, path), Path(path))


def read_run(path: str | Path) -> Run:
    """Reads a run file, YAML or JSON. Relative paths of LoRAs and of the model are relative to the file.

    Raises:
        FileError: If it is missing, unreadable or says something else than a run.
    """
    return _located(read_as(Run, path), Path(path))


def read_as(kind: type[_Model], path: str | Path) -> _Model:
    """Reads a YAML or JSON file as a model. Paths in it stay as they are.

    Raises:
        FileError: If it is missing, unreadable or says something else.
    """
    path = Path(path)
    return _validated(kind, _parse(path), str(path))


def write_scene(scene: Scene, path: str | Path, *, overwrite: bool = False) -> None:
    """Writes a scene file, YAML or JSON by its suffix. LoRAs below the file's folder become relative paths.

    Raises:
        FileError: If the file exists and is not to be overwritten, or for other suffixes.
    """
    _write_model(scene, Path(path), overwrite)


def write_run(run: Run, path: str | Path, *, overwrite: bool = False) -> None:
    """Writes a run file, YAML or JSON by its suffix. LoRAs and models below the file's folder become relative paths.

    Raises:
        FileError: If the file exists and is not to be overwritten, or for other suffixes.
    """
    _write_model(run, Path(path), overwrite)


def save_image(image: Image.Image, path: str | Path, record: Record | None = None) -> Path:
    """Writes a PNG that carries its record. It appears whole or not at all, and no file is ever overwritten.

    Args:
        image: The picture.
        path: Where to; missing folders are made. If there is such a file, "-2", "-3", ... is added to its name.
        record: How it was made. Paths in it are made absolute, with "~" for the home folder.

    Returns:
        Where it was written.
    """
    return write_new(Path(path), png_bytes(image, record), free_path)


def png_bytes(image: Image.Image, record: Record | None = None) -> bytes:
    """A PNG that carries its record. Paths in it are made absolute, with "~" for the home folder."""
    info = PngInfo()
    if record is not None:
        portable = record.model_copy(update={"run": _moved(record.run, _to_record)})
        info.add_text(RECORD_KEY, json.dumps(portable.model_dump(mode="json")))
    buffer = BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def read_record(path: str | Path) -> Record:
    """Reads how a picture was made. Reading opens no model and no LoRA.

    Raises:
        FileError: If it is no PNG, carries no record, or one that is broken.
    """
    path = Path(path)
    with _regular(path) as file:
        record = record_in(file, str(path))
    return record.model_copy(update={"run": _located(record.run, path)})


def record_in(file: BinaryIO, where: str) -> Record:
    """Reads how a picture was made, as `read_record`. Paths in the record stay as they are.

    Args:
        file: The picture.
        where: What complaints call it.

    Raises:
        FileError: If it is no PNG, carries no record, or one that is broken.
    """
    with _opened(file, where) as image:
        text = image.info.get(RECORD_KEY)
    if not isinstance(text, str):
        raise FileError(
            f"{where} carries no record of lora-compose: it was made by something else, or a program that edited or "
            "shrank it has dropped the record"
        )
    if len(text) > _RECORD_LIMIT:
        raise FileError(f"{where}: the record has {len(text)} characters; at most {_RECORD_LIMIT} are read")
    where = f"{where}, its record"
    return _validated(Record, _json(text, where), where)


def read_pixels(path: str | Path) -> Image.Image:
    """Reads the picture in a PNG, as RGB.

    Raises:
        FileError: If it is no PNG, is damaged, or is too large to be a picture of ours.
    """
    with _regular(Path(path)) as file, _opened(file, str(path)) as image:
        return image.convert("RGB")


def free_path(path: Path) -> Path:
    """The path itself if nothing is there, else the first free one of "name-2", "name-3", ..."""
    numbered = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in count(2))
    # lexists: a link that leads nowhere is in the way, too
    return path if not os.path.lexists(path) else next(free for free in numbered if not os.path.lexists(free))


def is_hub_name(source: str) -> bool:
    """Whether a source reads as a repository on the hub ("user/my-cat-lora") and not as a file."""
    return bool(_HUB.fullmatch(source)) and not source.lower().endswith(_FILES)


# --- paths ---


def _expanded(source: str) -> Path:
    try:
        return Path(source).expanduser()
    except RuntimeError:  # "~stranger/...": there is no such home
        return Path(source)


def _is_named(source: str) -> bool:
    return source == PLAYGROUND or source.startswith(f"{PLAYGROUND}:")


def local_source(source: str, base: Path) -> str:
    """A source as a file in the folder `base` names it: names stay, and relative paths begin at that folder."""
    path = _expanded(source)
    if _is_named(source) or (is_hub_name(source) and not (base / path).exists()):
        return source
    return str(base / path)  # an absolute path stays what it is


def _to_file(source: str, base: Path) -> str:
    full = _to_record(source)
    path = _expanded(full)
    if full == source and not path.is_absolute():  # a name, not a path
        return source
    if not path.is_relative_to(base):
        return full
    relative = path.relative_to(base).as_posix()
    return f"./{relative}" if is_hub_name(relative) or _is_named(relative) else relative


def _to_record(source: str) -> str:
    """A path that is valid from everywhere on this machine, without the name of the user."""
    path = _expanded(source)
    if _is_named(source) or (is_hub_name(source) and not path.exists()):
        return source
    path, home = path.absolute(), Path.home()
    return f"~/{path.relative_to(home).as_posix()}" if path != home and path.is_relative_to(home) else str(path)


def _moved(model: Any, move: Any) -> Any:
    """The same scene or run with every path moved."""
    if isinstance(model, Run):
        return model.model_copy(update={"model": move(model.model), "scene": _moved(model.scene, move)})
    return model.model_copy(update={"concepts": tuple(_moved_concept(concept, move) for concept in model.concepts)})


def _moved_concept(concept: Concept, move: Any) -> Concept:
    paths = {"lora": concept.lora, "region": concept.region}
    return concept.model_copy(update={name: move(path) for name, path in paths.items() if isinstance(path, str)})


def _located(model: _Model, path: Path) -> _Model:
    """What a file says, with relative paths made absolute: they are relative to the file."""
    base = path.parent.absolute()
    return _moved(model, lambda source: local_source(source, base))


# --- text files ---


class _Loader(yaml.SafeLoader):
    """YAML without aliases, which can blow up, and without fields given twice, of which one would be lost."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem="aliases (*name) are not read here; write the value out",
                problem_mark=self.peek_event().start_mark,
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            twice = _twice([str(key.value) for key, _ in node.value]) or "a field"
            raise yaml.MarkedYAMLError(problem=f"{twice!r} is given twice", problem_mark=node.start_mark)
        return mapping


class _Dumper(yaml.SafeDumper):
    """YAML whose unusual characters are escaped: in other styles, some line breaks are read as spaces."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if data.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_str)


def parse_settings(texts: Sequence[str]) -> dict[str, Any]:
    """Reads settings as they are written on the command line, "cfg_mask=broadcast"; values are read as YAML.

    Raises:
        ValueError: For texts without "=" and settings given twice.
    """
    settings: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"--set {text}: expected NAME=VALUE, such as cfg_mask=broadcast")
        if name.strip() in settings:
            raise ValueError(f"--set {text}: {name.strip()} is given twice")
        settings[name.strip()] = parse_value(value)
    return settings


def parse_value(text: str) -> Any:
    """A value as YAML writes it: a number, true, a list, otherwise text.

    Raises:
        FileError: If it is not valid YAML.
    """
    return _yaml(text, "the value")


def _parse(path: Path) -> Any:
    kind = _kind(path)
    with _regular(path) as file:
        data = file.read(_TEXT_LIMIT + 1)
    if len(data) > _TEXT_LIMIT:
        raise FileError(f"{path} is larger than {_TEXT_LIMIT} bytes; that is no scene or run")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileError(f"{path} is not UTF-8 text: byte {error.start} is {data[error.start]:#04x}") from error
    return kind(text, str(path))


def _kind(path: Path) -> Any:
    kinds = {".yaml": _yaml, ".yml": _yaml, ".json": _json}
    if path.suffix.lower() not in kinds:
        raise FileError(f"{path}: expected a file that ends with {', '.join(kinds)}")
    return kinds[path.suffix.lower()]


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise FileError(f"{where}{place}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:  # characters and dates that YAML does not allow
        raise FileError(f"{where}: not valid YAML: {error}") from error
    except (RecursionError, TypeError) as error:  # nested without end; a mapping as a key
        raise FileError(f"{where}: not valid YAML for a scene or run") from error


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_distinct, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise FileError(f"{where}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from error
    except ValueError as error:
        raise FileError(f"{where}: {error}") from error
    except RecursionError as error:
        raise FileError(f"{where}: nested too deeply") from error


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError(f"{_twice([name for name, _ in pairs])!r} is given twice")
    return found


def _twice(names: list[str]) -> str | None:
    return next((name for name, times in Counter(names).items() if times > 1), None)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number that can be used here")


def _write_model(model: Scene | Run, path: Path, overwrite: bool) -> None:
    as_json = _kind(path) is _json
    if path.exists() and not overwrite:
        raise FileError(f"{path} exists already; choose another name")
    folder = path.parent.absolute()
    data = _moved(model, lambda source: _to_file(source, folder)).model_dump(mode="json", exclude_none=True)
    if as_json:
        text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    else:
        text = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)
    write_whole(path, text.encode())


# --- validation ---


def _validated(kind: type[_Model], data: Any, where: str) -> _Model:
    if not isinstance(data, dict):
        raise FileError(f"{where}: expected {', '.join(kind.model_fields)}, found {_came(data)}")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise FileError("\n".join(f"{where}: {line}" for line in complaints(kind, error))) from error


def complaints(kind: type[BaseModel], error: ValidationError) -> list[str]:
    """What is wrong, a line for every place, with what was expected and what was found.

    Args:
        kind: What was validated.
        error: What came of it.
    """
    return [f"{_place(found['loc'])}{_complaint(kind, found)}" for found in error.errors(include_url=False)]


def _place(location: tuple[int | str, ...]) -> str:
    # Which kind of region it was taken for is no place in a file.
    named = [step for i, step in enumerate(location) if "region" not in location[max(0, i - 1) : i]]
    steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in named)
    place = "".join(steps).removeprefix(".")
    return f"{place}: " if place else ""


def _complaint(kind: type[BaseModel], found: Any) -> str:
    location, problem = found["loc"], found["type"]
    if problem == "extra_forbidden":
        return f"there is no such field; there are {', '.join(_fields(kind, location[:-1]))}"
    if problem == "missing":
        return "is missing"
    if problem == "value_error":
        return str(found["ctx"]["error"])
    hint = (
        "; put it in quotes" if problem == "string_type" and not isinstance(found["input"], dict | list | None) else ""
    )
    message = found["msg"].replace("Input should be", "expected").replace("String should", "expected text that should")
    return f"{message[:1].lower()}{message[1:]}, found {_came(found['input'])}{hint}"


def _fields(kind: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    for step in location:
        if isinstance(step, str) and step in kind.model_fields:
            kind = next(_models_in(kind.model_fields[step].annotation), kind)
    return list(kind.model_fields)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that a field's type mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)


def _came(value: Any) -> str:
    """A value in an error message, short whatever it is."""
    if isinstance(value, dict | list):
        return f"{'fields' if isinstance(value, dict) else 'a list'} ({len(value)} entries)"
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


# --- files on disk ---


@contextmanager
def _regular(path: Path) -> Iterator[BinaryIO]:
    """A file to be read, and no pipe or device, which would keep us waiting."""
    try:
        with open_regular(path) as file:
            yield file
    except FileNotFoundError as error:
        raise FileError(f"there is no file {str(path)!r}") from error
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}") from error


@contextmanager
def _opened(file: BinaryIO, where: str) -> Iterator[Image.Image]:
    try:
        if file.seek(0, os.SEEK_END) > _PICTURE_LIMIT:
            raise FileError(f"{where} is larger than {_PICTURE_LIMIT} bytes; that is no picture of lora-compose")
        file.seek(0)
        with Image.open(file, formats=("PNG",)) as image:
            if image.width * image.height > _PIXEL_LIMIT:
                raise FileError(
                    f"{where} has {image.width} x {image.height} pixels, too many for a picture of lora-compose"
                )
            yield image
    except FileError:
        raise
    except Exception as error:  # pictures come from strangers, and what Pillow raises for damaged ones has no end
        reason = str(error).strip() or type(error).__name__
        raise FileError(f"{where} is not a readable PNG (another format, truncated or damaged?): {reason}") from error
