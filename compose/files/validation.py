"""Complaints about what a file, a command or a field of the page says: where, what was expected, what was found."""

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from lora_compose.compose.files.reading import FileError
from lora_compose.pipelines.complaints import complaints, field_names, shown_value

__all__ = ["complaints", "validated"]

_Model = TypeVar("_Model", bound=BaseModel)


def validated(kind: type[_Model], data: Any, where: str) -> _Model:
    """Data as a model.

    Args:
        kind: The model.
        data: What a file says.
        where: What complaints call it.

    Raises:
        FileError: If it does not fit; a line for every place.
    """
    if not isinstance(data, dict):
        raise FileError(f"{where}: expected {', '.join(field_names(kind))}, found {shown_value(data)}")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise FileError("\n".join(f"{where}: {line}" for line in complaints(kind, error))) from error
