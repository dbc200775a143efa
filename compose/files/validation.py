"""Validation of files, commands and fields of the page, with errors that name the expected and the actual value."""

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from lora_compose.compose.files.reading import FileError
from lora_compose.pipelines.support.field_errors import field_messages, field_names, shown_value

_Model = TypeVar("_Model", bound=BaseModel)


def validated(kind: type[_Model], data: Any, where: str) -> _Model:
    """A file's content as a model. Raises FileError, with the name `where` and a line for every wrong field."""
    if not isinstance(data, dict):
        raise FileError(f"{where}: expected {', '.join(field_names(kind))}, found {shown_value(data)}")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise FileError("\n".join(f"{where}: {line}" for line in field_messages(kind, error))) from error
