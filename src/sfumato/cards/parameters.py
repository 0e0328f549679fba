"""Parameters as data, for tables, flags and forms: of a schema, or read from a source file without importing it."""

from __future__ import annotations

import ast
import re
import types
import typing
from dataclasses import dataclass
from pathlib import Path
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
        meaning = _meaning(field.description, extra, limits)
        kind, flag = _kind(field.annotation), bool(extra.get("flag", True))
        default = REQUIRED if field.is_required() else repr(field.default)
        found.append(Parameter(name, kind, default, meaning, flag))
    return found


def parameter_rows(schema: type[BaseModel]) -> list[tuple[str, str, str]]:
    """(name, default, meaning with unit and range) of every parameter, for tables."""
    return [(each.name, each.default, each.meaning) for each in parameters_of(schema)]


REQUIRED = "required"
KINDS = {"bool", "int", "float", "str", "list"}
LIMITS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
#: types of parameters that have a name of their own -> what they are; only importing would tell
ALIASES = {
    "FilePath": "str", "ModelPath": "str",
    "Window": "tuple", "WindowEdges": "list",
    "Factors": "list", "WordWindows": "list",
}  # fmt: skip


def _meaning(description: str | None, extra: dict[str, Any], limits: dict[str, Any]) -> str:
    notes = [f"unit: {extra['unit']}"] if "unit" in extra else []
    notes += [f"{LIMITS[key]} {value}" for key, value in limits.items() if abs(value) < 1e9]
    return (description or "") + (f" ({', '.join(notes)})" if notes else "")


def _kind(annotation: Any) -> str:
    """What a text becomes, by the type of a parameter or its source text; None aside."""
    if isinstance(annotation, str):
        names = {part.strip() for part in re.sub(r"\[.*\]", "", annotation).split(" | ")} - {"None"}
        names = {ALIASES.get(name, name) for name in names}
        if not names <= KINDS | {"Literal", "tuple", "dict", "Any"}:
            raise ValueError(f"{annotation} is a name that only importing would explain")
    else:
        parts = typing.get_args(annotation) if typing.get_origin(annotation) in _UNIONS else (annotation,)
        parts = tuple(part.__origin__ if hasattr(part, "__metadata__") else part for part in parts)  # Annotated
        kinds = {typing.get_origin(part) or part for part in parts} - {type(None)}
        names = {getattr(kind, "__name__", "any") for kind in kinds}
    return names.pop() if len(names) == 1 and names <= KINDS else "any"


_UNIONS = (typing.Union, types.UnionType)


def parameters_in(path: Path) -> list[Parameter] | None:
    """The fields of the class ``Params`` in a source file, read without importing it; None where some of them are
    inherited, or not written as literals."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    systems = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    inner = [each for node in systems for each in node.body if isinstance(each, ast.ClassDef)]
    schemas = [each for each in inner if each.name == "Params"]
    if len(schemas) != 1 or [ast.unparse(base) for base in schemas[0].bases] not in (["cards.Params"], ["Params"]):
        return None
    constants = {
        ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)
    }  # fmt: skip
    try:
        return [
            _parameter(node, constants)
            for node in schemas[0].body
            if isinstance(node, ast.AnnAssign) and "ClassVar" not in ast.unparse(node.annotation)
        ]
    except ValueError:
        return None


def _parameter(node: ast.AnnAssign, constants: dict[str, ast.expr]) -> Parameter:
    """Raises ValueError for what is not written as literals or constants of the file."""
    if not isinstance(node.value, ast.Call):
        raise ValueError
    given = {str(word.arg): word.value for word in node.value.keywords}
    if node.value.args:
        given["default"] = node.value.args[0]
    facts = {
        name: ast.literal_eval(constants.get(ast.unparse(value), value))
        for name, value in given.items()
        if name in ("default", "description", "json_schema_extra", *LIMITS)
    }
    default = repr(facts["default"]) if "default" in facts else REQUIRED
    limits, extra = {key: facts[key] for key in LIMITS if key in facts}, facts.get("json_schema_extra", {})
    meaning = _meaning(facts.get("description"), extra, limits)
    name, kind = ast.unparse(node.target), _kind(ast.unparse(node.annotation))
    return Parameter(name, kind, default, meaning, bool(extra.get("flag", True)))
