"""What pydantic found wrong with a sweep file, as one line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from sparsekit.errors import nearest

__all__ = ["one_line"]


def one_line(error: ValidationError, model: type[BaseModel], where: str = "") -> str:
    """The first error: the field below `where`, its value, and what is allowed, with the nearest right name."""
    errors = error.errors()
    first = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])  # why another is missing
    path, value = ".".join(map(str, (*([where] if where else ()), *first["loc"]))), first["input"]
    if first["type"] == "extra_forbidden":
        fields, name = list(_inner(model, first["loc"][:-1]).model_fields), str(first["loc"][-1])
        return f"unknown field {path!r} = {value!r}; allowed: {', '.join(fields)}.{nearest(name, fields)}"
    if first["type"] == "missing":
        return f"{path}: is needed."
    if first["type"] == "too_short":
        return f"{path}: {'empty grid: ' if len(first['loc']) == 1 else ''}at least one is needed."
    message = first["msg"].removeprefix("Value error, ").replace("Input should", "it should").rstrip(".")
    return f"{path} = {value!r}: {message}{'' if message.endswith('?') else '.'}"


def _inner(model: type[BaseModel], path: Sequence[int | str]) -> type[BaseModel]:
    """The model that a path of field names leads to."""
    for name in path:
        annotation: Any = model.model_fields[str(name)].annotation
        kinds = (annotation, *get_args(annotation))
        model = next(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel))
    return model
