"""Parameters of a schema as data, for tables, flags and forms."""

from __future__ import annotations

import types
import typing
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel


@dataclass(frozen=True)
class Parameter:
    """One parameter for tables, flags and forms: ``kind`` is bool, int, float, str, list or any; ``default`` is written
    as in Python; ``meaning`` holds the description, the unit and the limits; ``flag``: whether it can be said in text.
    """

    name: str
    kind: str
    default: str
    meaning: str
    flag: bool = True


def parameters_of(schema: type[BaseModel]) -> list[Parameter]:
    """The parameters of a schema."""
    found = []
    for name, field in schema.model_fields.items():
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        limits = {key: getattr(each, key) for each in field.metadata for key in LIMITS if hasattr(each, key)}
        kind, flag = _kind(field.annotation), bool(extra.get("flag", True))
        default = REQUIRED if field.is_required() else repr(field.default)
        found.append(Parameter(name, kind, default, meaning(field.description, extra, limits), flag))
    return found


def parameter_rows(schema: type[BaseModel]) -> list[tuple[str, str, str]]:
    """(name, default, meaning with unit and range) of every parameter, for tables."""
    return [(each.name, each.default, each.meaning) for each in parameters_of(schema)]


REQUIRED = "required"
KINDS = {"bool", "int", "float", "str", "list"}
LIMITS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def meaning(description: str | None, extra: dict[str, Any], limits: dict[str, Any]) -> str:
    """The description with unit and limits."""
    notes = [f"unit: {extra['unit']}"] if "unit" in extra else []
    notes += [f"{LIMITS[key]} {value}" for key, value in limits.items() if abs(value) < 1e9]
    return (description or "") + (f" ({', '.join(notes)})" if notes else "")


def _kind(annotation: Any) -> str:
    """What a text becomes, by the type of a parameter; None aside."""
    parts = typing.get_args(annotation) if typing.get_origin(annotation) in _UNIONS else (annotation,)
    parts = tuple(part.__origin__ if hasattr(part, "__metadata__") else part for part in parts)  # Annotated
    kinds = {typing.get_origin(part) or part for part in parts} - {type(None)}
    names = {getattr(kind, "__name__", "any") for kind in kinds}
    return names.pop() if len(names) == 1 and names <= KINDS else "any"


_UNIONS = (typing.Union, types.UnionType)
