"""Parameters that name files: marked in the schema, so that an untrusted recipe opens none that its reader has not
allowed.

A parameter that a system opens is declared as :data:`FilePath`, or :data:`ModelPath` where the name of a built-in model
may stand as well, alone or inside lists and unions::

    images: list[FilePath] = Field(default=[], description="reference pictures")

In the schema's JSON they have the format ``path``.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel

from sfumato import registry
from sfumato.errors import NotAllowed
from sfumato.valid import brief

__all__ = ["EMBEDDED", "FilePath", "ModelPath", "PathMark", "marked", "opens", "refuse_unallowed"]

EMBEDDED = "data:image/png;base64,"
"""How a text begins that is a picture itself, not the name of one."""


@dataclass(frozen=True)
class PathMark:
    """Marks a text as the name of a file or folder; ``models``: a built-in model's name is one too."""

    models: bool = False

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: Any) -> Any:
        return {**handler(core_schema), "format": "path"}


FilePath = Annotated[str, PathMark()]
ModelPath = Annotated[str, PathMark(models=True)]


def marked(schema: type[BaseModel]) -> dict[str, PathMark]:
    """The parameters of a schema that name files."""
    found = {}
    for name, field in schema.model_fields.items():
        marks = [*_marks(field.annotation), *(each for each in field.metadata if isinstance(each, PathMark))]
        if marks:
            found[name] = marks[0]
    return found


def _marks(annotation: Any) -> Iterator[PathMark]:
    yield from (each for each in getattr(annotation, "__metadata__", ()) if isinstance(each, PathMark))
    for part in typing.get_args(annotation):
        if not isinstance(part, PathMark):
            yield from _marks(part)


def opens(schema: type[BaseModel], given: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(parameter, file) for every file of this computer that parameters, as they stand in a recipe, name: neither a
    built-in model, nor a picture that is embedded."""
    found = []
    for name, mark in marked(schema).items():
        for text in _texts(given.get(name)):
            if not text or text.startswith(EMBEDDED) or (mark.models and text in registry.names()):
                continue
            found.append((name, text))
    return found


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for each in value.values() for text in _texts(each))
    elif isinstance(value, Sequence):
        yield from (text for each in value for text in _texts(each))


def allowed(text: str, allow: Sequence[str | Path]) -> bool:
    """Whether ``allow`` names this file, or a folder that it lies in; symbolic links are followed first."""
    names = {text, re.sub(r":-?[\d.]+$", "", text)}  # reference pictures may have a weight behind them
    for each in allow:
        root = _resolved(str(each))
        for name in names:
            place = _resolved(name)
            if name == str(each) or (
                root is not None and place is not None and (root == place or root in place.parents)
            ):
                return True
    return False


def _resolved(text: str) -> Path | None:
    try:
        return Path(text).expanduser().resolve()
    except (OSError, RuntimeError, ValueError):  # no home, a circle of links, a zero byte
        return None


def refuse_unallowed(found: Sequence[tuple[str, str, str]], allow: Sequence[str | Path], whose: str) -> None:
    """Raises NotAllowed, which lists what of ``found`` - (system, parameter, file) - ``allow`` does not name."""
    closed = [each for each in found if not allowed(each[2], allow)]
    if not closed:
        return
    listed = ", ".join(f"{brief(text, 200)} ({name} of {system})" for system, name, text in closed[:5])
    listed += f" and {len(closed) - 5} more" if len(closed) > 5 else ""
    remedy = " ".join(f"--allow {_quoted(text)}" for text in dict.fromkeys(text for *_, text in closed[:5]))
    raise NotAllowed(
        f"{whose} names files of this computer, and a recipe may open none unasked: {listed}; if you know them, add "
        f"{remedy} (allow=[...] in Python)."
    )


def _quoted(text: str) -> str:
    import shlex

    return shlex.quote(text) if text.isprintable() and len(text) <= 200 else brief(text, 200)
