"""Strict reading of YAML and JSON: no duplicate fields, no aliases, and every error names its position."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from lora_compose.compose.files.reading import FileError, read_text

_TEXT_LIMIT = 2**20  # bytes of a scene file


def parse_value(text: str) -> Any:
    """A value in YAML: a number, true, a list, otherwise text; raises FileError if it is not valid YAML."""
    return _yaml(text, "the value")


def parse_file(path: Path, limit: int | None = None) -> Any:
    """The content of a YAML or JSON file of at most `limit` bytes, enough for a scene. FileError if it is not valid."""
    kind = _kind(path)
    return kind(read_text(path, limit or _TEXT_LIMIT, "; that is no scene or run"), str(path))


def parse_json(text: str, where: str) -> Any:
    """The content of a JSON text. Raises FileError, with the name `where`, if it is not valid or has a field twice."""
    try:
        return json.loads(text, object_pairs_hook=_distinct, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise FileError(f"{where}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from error
    except ValueError as error:
        raise FileError(f"{where}: {error}") from error
    except RecursionError as error:
        raise FileError(f"{where}: nested too deeply") from error


def is_json(path: Path) -> bool:
    """Whether a file is JSON and not YAML, by its suffix; raises FileError for other suffixes."""
    return _kind(path) is parse_json


def to_yaml(data: Any) -> str:
    """Data as YAML that every reader takes for the same text."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)


def _kind(path: Path) -> Any:
    kinds = {".yaml": _yaml, ".yml": _yaml, ".json": parse_json}
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


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(distinct := dict(pairs)) < len(pairs):
        raise ValueError(f"{_twice([name for name, _ in pairs])!r} is given twice")
    return distinct


def _twice(names: list[str]) -> str | None:
    return next((name for name, times in Counter(names).items() if times > 1), None)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number that can be used here")


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
