"""The scenes of a batch: from scene files, folders of them, batch files, and tables with a template.

An error in one scene is kept with its entry, so that the others can be made; an error in a whole file is raised.
Nothing here needs torch.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from lora_compose.compose.batch.settings import BatchSettings, Seeds
from lora_compose.compose.batch.tables import MOST_BYTES as TABLE_BYTES
from lora_compose.compose.batch.tables import SUFFIXES as TABLES
from lora_compose.compose.batch.tables import Row, Table, read_table
from lora_compose.compose.batch.templates import fill, placeholders
from lora_compose.compose.files.paths import check_lora, local_source, located, moved_weights
from lora_compose.compose.files.reading import FileError
from lora_compose.compose.files.text import parse_file
from lora_compose.compose.files.validation import validated
from lora_compose.compose.support.frozen import Frozen
from lora_compose.compose.support.names import check_merger, did_you_mean, file_near
from lora_compose.pipelines.scene.scene import Concept, Scene
from lora_compose.pipelines.scene.sources import files_of
from lora_compose.pipelines.support.home import expanded

_SCENES = (".yaml", ".yml", ".json")
MOST_NAME_BYTES = 200
"""Bytes of a name: with seed, number and suffix, file systems take 255."""
_MOST_BYTES = 4 * TABLE_BYTES  # of a batch file in JSON; for several processes, a table becomes one with all scenes
_OWN = ("name", "seed", "seeds")


def _short_enough(name: str) -> str:
    if (size := len(name.encode())) > MOST_NAME_BYTES:
        raise ValueError(f"as a file name it has {size} bytes; expected at most {MOST_NAME_BYTES}: give a shorter one")
    return name


class _Named(Frozen):
    """The fields of an entry besides its scene."""

    name: Annotated[str, Field(pattern=r"^\w[\w .,+-]{0,99}$"), AfterValidator(_short_enough)]
    seeds: Seeds | None = None


@dataclass(frozen=True)
class Entry:
    """A scene of a batch with absolute paths; without seeds of its own (None) it has those of the batch."""

    name: str
    scene: Scene
    seeds: tuple[int, ...] | None
    source: str


@dataclass(frozen=True)
class InvalidEntry:
    """A scene that cannot be made: its file, with the line where it is a table, and what is wrong."""

    source: str
    error: str


@dataclass(frozen=True)
class BatchScenes:
    """The scenes of all sources, the bad ones, and the fields of `BatchSettings` that a batch file gives."""

    entries: tuple[Entry, ...]
    bad: tuple[InvalidEntry, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


def read_entries(
    sources: Iterable[str | Path], template: str | Path | None = None, concepts: Sequence[Concept] = ()
) -> BatchScenes:
    """Reads the scenes of scene files, folders of them, tables (CSV, TSV, JSONL), or one batch file.

    The rows of tables fill the placeholders of a template, a scene file, and have `concepts` in place of its own.
    Raises FileError if a file is missing, is something else, or has a header that does not fit the template.
    """
    paths = [_existing(source) for source in sources]
    if not paths:
        raise FileError("there is nothing to make; name scene files, a folder, a table or a batch file")
    base = _Template.read(None if template is None else Path(template), concepts)
    tables = any(path.suffix.lower() in TABLES for path in paths)
    if base.fields and not tables:
        raise FileError("a template and concepts are for tables (.csv, .tsv, .jsonl), and there is none")
    settings: dict[str, Any] = {}
    read: list[Entry | InvalidEntry] = []
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
    return BatchScenes(tuple(entries), tuple(bad), settings)


def _existing(source: str | Path) -> Path:
    path = expanded(source)
    if not path.exists():
        raise FileError(f"there is no file or folder {str(source)!r}{file_near(path)}")
    if path.is_file() and path.suffix.lower() not in (*_SCENES, *TABLES):
        raise FileError(f"{path}: expected a folder, or a file that ends with {', '.join((*_SCENES, *TABLES))}")
    return path


def _parsed(path: Path) -> Any:
    """The content of a YAML or JSON file; a `FileError` is returned, so that other files are still read."""
    try:
        return parse_file(path, _MOST_BYTES if path.suffix.lower() == ".json" else None)
    except FileError as error:
        return error


def _entry(
    name: Any, scene: Any, seeds: Any, path: Path, source: str, base: Path | None = None
) -> Entry | InvalidEntry:
    """A scene, checked without torch; paths in it are relative to `base`, by default its own file."""
    try:
        named = validated(_Named, {"name": name, "seeds": seeds}, source)
        valid_scene = located(validated(Scene, scene, source), base or path)
    except FileError as error:
        return InvalidEntry(source, str(error))
    for concept in valid_scene.concepts:
        try:
            check_merger(concept.merge)
            for file in files_of(concept.lora):
                check_lora(file)
        except ValueError as error:
            return InvalidEntry(source, f"{source}: concept {concept.name!r}: {error}")
        if not (concept.lora or concept.is_bystander):
            return InvalidEntry(source, f"{source}: concept {concept.name!r} has no LoRA: give it a field lora")
    return Entry(named.name, valid_scene, named.seeds, source)


def _scene_file(path: Path, data: Any) -> Entry | InvalidEntry:
    if isinstance(data, FileError):
        return InvalidEntry(str(path), str(data))
    return _entry(path.stem, data, None, path, str(path))


def _of_folder(folder: Path) -> Iterator[Entry | InvalidEntry]:
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SCENES and path.is_file())
    if not paths:
        raise FileError(f"the folder {str(folder)!r} has no scene files ({', '.join(_SCENES)})")
    return (_scene_file(path, _parsed(path)) for path in paths)


def _settings_in(data: Mapping[str, Any], path: Path) -> dict[str, Any]:
    fields = {name: value for name, value in data.items() if name != "scenes"}
    known = list(BatchSettings.model_fields)
    for name in fields.keys() - set(known):
        raise FileError(
            f"{path}: {name}: unknown field; fields are {', '.join([*known, 'scenes'])}{did_you_mean(name, known)}"
        )
    if isinstance(fields.get("model"), str):
        fields["model"] = local_source(fields["model"], path.parent.absolute())
    if isinstance(fields.get("quantize"), str):
        fields["quantize"] = moved_weights(fields["quantize"], lambda file: local_source(file, path.parent.absolute()))
    return fields


def _of_batch_file(scenes: Any, path: Path) -> Iterator[Entry | InvalidEntry]:
    if not isinstance(scenes, list) or not scenes:
        raise FileError(f"{path}: scenes: expected a list of scenes, each with a name and a prompt")
    for i, scene in enumerate(scenes):
        source = f"{path}, scenes[{i}]"
        named = {name: scene[name] for name in _OWN if name in scene} if isinstance(scene, dict) else {}
        if "seed" in named and "seeds" in named:
            yield InvalidEntry(source, f"{source}: give seed or seeds, not both")
            continue
        fields = {k: v for k, v in scene.items() if k not in named} if isinstance(scene, dict) else scene
        yield _entry(named.get("name"), fields, named.get("seeds", named.get("seed")), path, source)


@dataclass(frozen=True)
class _Template:
    """Fields of a scene with placeholders; without a file of its own, paths are relative to the table."""

    fields: Mapping[str, Any]
    path: Path | None

    @classmethod
    def read(cls, path: Path | None, concepts: Sequence[Concept]) -> "_Template":
        """Reads a template from a file, and adds the concepts of all rows."""
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
            listed = located(scene, here / "options").model_dump(mode="json", exclude_none=True)["concepts"]
            fields = {**fields, "concepts": [_literal(concept) for concept in listed]}
        return cls(fields, path)

    def uses(self, columns: Iterable[str]) -> str | None:
        """An error in these columns; None if all of them are used, and no placeholder is left."""
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
        from_columns = {name: f"{{{name}}}" for name in values if name in Scene.model_fields and name not in names}
        return fill({**self.fields, **from_columns}, values)


def _literal(data: Any) -> Any:
    """Data with escaped braces."""
    if isinstance(data, dict):
        return {name: _literal(value) for name, value in data.items()}
    if isinstance(data, list):
        return [_literal(value) for value in data]
    return data.replace("{", "{{").replace("}", "}}") if isinstance(data, str) else data


def _of_table(path: Path, template: _Template) -> Iterator[Entry | InvalidEntry]:
    table = read_table(path)
    if table.columns is not None and (wrong := template.uses(table.columns)):
        raise FileError(f"{path}, line 1: {wrong}")
    return (_of_row(path, table, row, template) for row in table.rows)


def _of_row(path: Path, table: Table, row: Row, template: _Template) -> Entry | InvalidEntry:
    source = f"{path}, line {row.line}"
    wrong = row.error or (None if table.columns is not None else template.uses(row.values))
    if wrong:
        return InvalidEntry(source, f"{source}: {wrong}")
    try:
        scene = template.scene(row.values)
    except ValueError as error:
        return InvalidEntry(source, f"{source}: {error}")
    named = {name: row.values[name] for name in _OWN if row.values.get(name) not in (None, "")}
    name = named.get("name", f"{path.stem}-{row.line:04}")
    return _entry(name, scene, named.get("seeds", named.get("seed")), path, source, template.path)


def _distinct(read: Iterable[Entry | InvalidEntry]) -> tuple[list[Entry], list[InvalidEntry]]:
    """Valid and invalid entries; those with a name that is taken are invalid."""
    entries: dict[str, Entry] = {}
    bad: list[InvalidEntry] = []
    for item in read:
        if isinstance(item, InvalidEntry):
            bad.append(item)
        elif (known := entries.get(item.name.casefold())) is not None:  # file systems may ignore case
            bad.append(InvalidEntry(item.source, f"{item.source}: the name {item.name!r} is taken by {known.source}"))
        else:
            entries[item.name.casefold()] = item
    return list(entries.values()), bad
