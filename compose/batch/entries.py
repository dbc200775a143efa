"""The scenes of a batch: from scene files, folders of them, batch files, and tables with a template.

What is wrong with one scene is kept beside the others; what is wrong with a whole file is raised. Nothing here needs
torch.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from lora_compose.compose.batch.settings import BatchSettings, Seeds
from lora_compose.compose.batch.tables import SUFFIXES as TABLES
from lora_compose.compose.batch.tables import Row, Table, read_table
from lora_compose.compose.batch.templates import fill, placeholders
from lora_compose.compose.files.paths import check_lora, local_source, located
from lora_compose.compose.files.reading import FileError
from lora_compose.compose.files.text import parse_file
from lora_compose.compose.files.validation import validated
from lora_compose.compose.support.names import check_merger, did_you_mean, file_near
from lora_compose.pipelines.concepts.sources import files_of
from lora_compose.pipelines.scene import Concept, Scene

_SCENES = (".yaml", ".yml", ".json")
_MOST_BYTES = 64 * 2**20  # of a batch file in JSON
_OWN = ("name", "seed", "seeds")


class _Named(BaseModel):
    """What an entry has besides its scene."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^\w[\w .,+-]{0,99}$")]
    seeds: Seeds | None = None


@dataclass(frozen=True)
class Entry:
    """A scene of a batch.

    Attributes:
        name: Names its images: `NAME-SEED.png`.
        scene: Prompt, concepts and size; its paths are absolute.
        seeds: Of its images; None takes those of the batch.
        source: The file, and the line where it is a table.
    """

    name: str
    scene: Scene
    seeds: tuple[int, ...] | None
    source: str


@dataclass(frozen=True)
class Bad:
    """A scene that cannot be made.

    Attributes:
        source: The file, and the line where it is a table.
        complaint: What is wrong, with the source.
    """

    source: str
    complaint: str


@dataclass(frozen=True)
class Found:
    """What sources say.

    Attributes:
        entries: The scenes that can be made.
        bad: The others.
        settings: Fields of `BatchSettings` that a batch file gives.
    """

    entries: tuple[Entry, ...]
    bad: tuple[Bad, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


def read_entries(
    sources: Iterable[str | Path], template: str | Path | None = None, concepts: Sequence[Concept] = ()
) -> Found:
    """Reads the scenes of a batch.

    Args:
        sources: Scene files, folders of them, tables (CSV, TSV, JSONL), or one batch file.
        template: A scene file with placeholders, for tables.
        concepts: Those of all rows of tables, in place of a template's.

    Raises:
        FileError: If a file is missing, is something else, or has a header that does not fit the template.
    """
    paths = [_existing(source) for source in sources]
    if not paths:
        raise FileError("there is nothing to make; name scene files, a folder, a table or a batch file")
    base = _Template.read(None if template is None else Path(template), concepts)
    tables = any(path.suffix.lower() in TABLES for path in paths)
    if base.given and not tables:
        raise FileError("a template and concepts are for tables (.csv, .tsv, .jsonl), and there is none")
    settings: dict[str, Any] = {}
    read: list[Entry | Bad] = []
    for path in paths:
        if path.suffix.lower() in TABLES:
            read += _of_table(path, base)
        elif path.is_dir():
            read += _of_folder(path)
        elif isinstance(data := _parsed(path), dict) and "scenes" in data:
            if len(paths) > 1:
                raise FileError(f"{path} is a batch file, with settings for all of its scenes; give nothing else")
            settings = _settings_in(data, path)
            read += _of_batch_file(data["scenes"], path)
        else:
            read.append(_scene_file(path, data))
    entries, bad = _distinct(read)
    return Found(tuple(entries), tuple(bad), settings)


def _existing(source: str | Path) -> Path:
    path = Path(source).expanduser()
    if not path.exists():
        raise FileError(f"there is no file or folder {str(source)!r}{file_near(path)}")
    if path.is_file() and path.suffix.lower() not in (*_SCENES, *TABLES):
        raise FileError(f"{path}: expected a folder, or a file that ends with {', '.join((*_SCENES, *TABLES))}")
    return path


def _parsed(path: Path) -> Any:
    """What a YAML or JSON file says; as a complaint if it is no YAML or JSON, because that spoils no other file."""
    try:
        return parse_file(path, _MOST_BYTES if path.suffix.lower() == ".json" else None)
    except FileError as error:
        return error


def _entry(name: Any, scene: Any, seeds: Any, path: Path, source: str, base: Path | None = None) -> Entry | Bad:
    """A scene with all that can be checked without torch.

    Args:
        name: Its name.
        scene: Its fields.
        seeds: Its seeds; None if it has none.
        path: The file.
        source: What complaints call the place.
        base: The file that paths are relative to; None is the same.
    """
    try:
        named = validated(_Named, {"name": name, "seeds": seeds}, source)
        found = located(validated(Scene, scene, source), base or path)
    except FileError as error:
        return Bad(source, str(error))
    for concept in found.concepts:
        try:
            check_merger(concept.merge)
            for file in files_of(concept.lora):
                check_lora(file)
        except ValueError as error:
            return Bad(source, f"{source}: concept {concept.name!r}: {error}")
        if not concept.lora:
            return Bad(source, f"{source}: concept {concept.name!r} has no LoRA: give it a field lora")
    return Entry(named.name, found, named.seeds, source)


def _scene_file(path: Path, data: Any) -> Entry | Bad:
    if isinstance(data, FileError):
        return Bad(str(path), str(data))
    return _entry(path.stem, data, None, path, str(path))


def _of_folder(folder: Path) -> Iterator[Entry | Bad]:
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SCENES and path.is_file())
    if not paths:
        raise FileError(f"the folder {str(folder)!r} has no scene files ({', '.join(_SCENES)})")
    return (_scene_file(path, _parsed(path)) for path in paths)


def _settings_in(data: Mapping[str, Any], path: Path) -> dict[str, Any]:
    given = {name: value for name, value in data.items() if name != "scenes"}
    known = list(BatchSettings.model_fields)
    for name in given.keys() - set(known):
        raise FileError(
            f"{path}: {name}: unknown field; fields are {', '.join([*known, 'scenes'])}{did_you_mean(name, known)}"
        )
    if isinstance(given.get("model"), str):
        given["model"] = local_source(given["model"], path.parent.absolute())
    return given


def _of_batch_file(scenes: Any, path: Path) -> Iterator[Entry | Bad]:
    if not isinstance(scenes, list) or not scenes:
        raise FileError(f"{path}: scenes: expected a list of scenes, each with a name and a prompt")
    for i, scene in enumerate(scenes):
        source = f"{path}, scenes[{i}]"
        own = {name: scene[name] for name in _OWN if name in scene} if isinstance(scene, dict) else {}
        if "seed" in own and "seeds" in own:
            yield Bad(source, f"{source}: give seed or seeds, not both")
            continue
        fields = {k: v for k, v in scene.items() if k not in own} if isinstance(scene, dict) else scene
        yield _entry(own.get("name"), fields, own.get("seeds", own.get("seed")), path, source)


@dataclass(frozen=True)
class _Template:
    """What the rows of tables fill.

    Attributes:
        fields: Of a scene, with placeholders.
        path: The template's file; None if there is none, and paths are relative to the table.
    """

    fields: Mapping[str, Any]
    path: Path | None

    @property
    def given(self) -> bool:
        """Whether there is anything in it."""
        return bool(self.fields)

    @classmethod
    def read(cls, path: Path | None, concepts: Sequence[Concept]) -> "_Template":
        """From a file, and with the concepts of all rows."""
        fields = {} if path is None else parse_file(path)
        if not isinstance(fields, dict) or (path is not None and not fields):
            raise FileError(f"{path}: expected the fields of a scene, such as prompt: a {{animal}} on grass")
        if unknown := [name for name in fields if name not in Scene.model_fields]:
            near = did_you_mean(str(unknown[0]), Scene.model_fields)
            raise FileError(f"{path}: {unknown[0]}: unknown field; fields are {', '.join(Scene.model_fields)}{near}")
        if concepts and "concepts" in fields:
            raise FileError("give the concepts in the template or as options, not both")
        if concepts:
            here = Path.cwd()
            scene = Scene(prompt="-", concepts=tuple(concepts))
            given = located(scene, here / "options").model_dump(mode="json", exclude_none=True)["concepts"]
            fields = {**fields, "concepts": [_literal(concept) for concept in given]}
        return cls(fields, path)

    def uses(self, columns: Iterable[str]) -> str | None:
        """What is wrong with these columns; None if all of them are read, and no placeholder is left."""
        names, columns = placeholders(self.fields), list(columns)
        if lost := sorted(names - set(columns)):
            return f"no column for the template's {{{lost[0]}}}; columns are {', '.join(columns)}"
        known = [*names, *Scene.model_fields, *_OWN]
        for column in columns:
            if column not in known and not column.startswith("_"):
                hint = did_you_mean(column, known) or f"; _{column} is kept as a note"
                return f"nothing reads the column {column!r}; expected {', '.join(known)}{hint}"
        if "seed" in columns and "seeds" in columns:
            return "give seed or seeds, not both"
        return None

    def scene(self, values: Mapping[str, Any]) -> Any:
        """The fields of a scene: the template's, and those that columns are named after."""
        names = placeholders(self.fields)
        own = {name: f"{{{name}}}" for name in values if name in Scene.model_fields and name not in names}
        return fill({**self.fields, **own}, values)


def _literal(data: Any) -> Any:
    """Data in which braces stand for themselves."""
    if isinstance(data, dict):
        return {name: _literal(value) for name, value in data.items()}
    if isinstance(data, list):
        return [_literal(value) for value in data]
    return data.replace("{", "{{").replace("}", "}}") if isinstance(data, str) else data


def _of_table(path: Path, template: _Template) -> Iterator[Entry | Bad]:
    table = read_table(path)
    if table.columns is not None and (wrong := template.uses(table.columns)):
        raise FileError(f"{path}, line 1: {wrong}")
    return (_of_row(path, table, row, template) for row in table.rows)


def _of_row(path: Path, table: Table, row: Row, template: _Template) -> Entry | Bad:
    source = f"{path}, line {row.line}"
    wrong = row.complaint or (None if table.columns is not None else template.uses(row.values))
    if wrong:
        return Bad(source, f"{source}: {wrong}")
    try:
        scene = template.scene(row.values)
    except ValueError as error:
        return Bad(source, f"{source}: {error}")
    own = {name: row.values[name] for name in _OWN if row.values.get(name) not in (None, "")}
    name = own.get("name", f"{path.stem}-{row.line:04}")
    return _entry(name, scene, own.get("seeds", own.get("seed")), path, source, template.path)


def _distinct(read: Iterable[Entry | Bad]) -> tuple[list[Entry], list[Bad]]:
    """Those that can be made, and the others, with names that stand twice among them."""
    entries: dict[str, Entry] = {}
    bad: list[Bad] = []
    for one in read:
        if isinstance(one, Bad):
            bad.append(one)
        elif (known := entries.get(one.name.casefold())) is not None:  # names of files may not tell letters apart
            bad.append(Bad(one.source, f"{one.source}: the name {one.name!r} stands at {known.source} already"))
        else:
            entries[one.name.casefold()] = one
    return list(entries.values()), bad
