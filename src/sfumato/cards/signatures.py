"""Signatures from schemas: functions that take the options of a schema as ``**options`` show each of them by name.

For type checkers the options are a ``TypedDict`` (:func:`typed_dict` writes its source), for ``inspect.signature``,
``help`` and completion they are keyword-only parameters with their defaults (:func:`with_signature`).
"""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel

from sfumato.cards.parameters import REQUIRED, Parameter, parameters_of

Function = TypeVar("Function", bound=Callable[..., Any])


def with_signature(arguments: type, *groups: Iterable[Parameter]) -> Callable[[Function], Function]:
    """Decorator: the ``**options`` of a function are shown as the keys of ``arguments``, a ``TypedDict``, with the
    defaults that the first of ``groups`` with it has. A name that the function has itself stays as it is there."""
    defaults = {each.name: each.default for group in reversed(groups) for each in group}

    def add(function: Function) -> Function:
        signature = inspect.signature(function)
        own = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
        taken = {each.name for each in own}
        for name, annotation in arguments.__annotations__.items():
            if name not in taken:
                text = getattr(annotation, "__forward_arg__", annotation)
                own.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY,
                                             default=_value(defaults[name]), annotation=text))  # fmt: skip
        vars(function)["__signature__"] = signature.replace(parameters=own)
        return function

    return add


def _value(default: str) -> Any:
    return inspect.Parameter.empty if default == REQUIRED else ast.literal_eval(default)


def typed_dict(name: str, about: str, *schemas: type[BaseModel], without: Iterable[str] = (),
               types_of: Mapping[str, str] | None = None) -> str:  # fmt: skip
    """Source of a ``TypedDict`` with the fields of ``schemas`` (the first that has a name says what it is), all of them
    optional. ``types_of``: types of some, where more than the schema's own is taken."""
    lines = [f"class {name}(TypedDict, total=False):", f'    """{about}"""', ""]
    done = set(without)
    for schema in schemas:
        meanings = {each.name: each.meaning for each in parameters_of(schema)}
        for field, info in schema.model_fields.items():
            if field in done:
                continue
            done.add(field)
            lines.append(f"    {field}: {(types_of or {}).get(field) or written(info.annotation)}")
            meaning = meanings[field].replace("\\", "\\\\").replace('"', "'")
            meaning = meaning[:1].upper() + meaning[1:]
            lines += textwrap.wrap(f'"""{meaning}"""', 116, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines) + "\n"


def written(annotation: Any) -> str:
    """A type as it is written for whoever calls: a list may be any sequence, or one of its items."""
    if hasattr(annotation, "__metadata__"):  # Annotated
        return written(annotation.__origin__)
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        parts = [part for each in inside for part in written(each).split(" | ")]
        return " | ".join(dict.fromkeys(part for part in parts if part != "None")) + (
            " | None" if "None" in parts else ""
        )
    if origin is list:
        item = written(inside[0])
        return f"{item} | Sequence[{item}]" if item in ("str", "int", "float") else f"Sequence[{item}]"
    if origin is Literal:
        return f"Literal[{', '.join(map(json.dumps, inside))}]"
    if origin is not None:
        return f"{origin.__name__}[{', '.join('...' if each is ... else written(each) for each in inside)}]"
    return "None" if annotation is type(None) else "Any" if annotation is Any else annotation.__name__
