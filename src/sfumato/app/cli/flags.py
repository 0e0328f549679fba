"""Flags generated from schemas: each option of ``generate`` and each parameter of a system is declared once, where it
is used, and becomes a flag with its description, unit and limits here."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any

import typer

from sfumato import cards
from sfumato.app.cli.options import literal
from sfumato.errors import BadInput
from sfumato.sampling.options import CROPS, SIZES
from sfumato.valid import brief

TYPES: dict[str, Any] = {"int": int, "float": float, "bool": bool, "list": list[str]}
METAVARS = {
    "timesteps": "T|T|...",
    "sigmas": "S|S|...",
    **dict.fromkeys(SIZES, "WxH"),
    **dict.fromkeys(CROPS, "TOP|LEFT"),
}
METAVARS |= {"compose": "TEXT=WEIGHT", "guidance_interval": "START|END"}
DECLARED = {"n": "-n", "from_": "--from"}


def of_schema(
    schema: type[cards.Params], only: Sequence[str] = (), without: Sequence[str] = ()
) -> list[cards.Parameter]:
    """The options of a schema, all or ``only`` some, without those whose field says ``flag: False``."""
    return [
        each for each in cards.parameters_of(schema)
        if each.flag and each.name not in without and (not only or each.name in only)
    ]  # fmt: skip


def of_system(key: str, without: Iterable[str] = ()) -> list[cards.Parameter]:
    """The parameters of a system, read without importing it."""
    return [each for each in cards.parameters(key) if each.name not in without]


def with_flags(*groups: tuple[str, list[cards.Parameter]]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command a flag for each parameter of ``groups`` (title, parameters); the function receives them as
    keywords, None where a flag is not given. A name that the function or an earlier group has is left out."""

    def add(function: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(function)
        hints = typing.get_type_hints(function, include_extras=True)
        own = [
            each.replace(annotation=hints[name], kind=each.KEYWORD_ONLY)
            for name, each in signature.parameters.items()
            if each.kind is not each.VAR_KEYWORD
        ]
        taken = {each.name for each in own}
        for title, parameters in groups:
            for parameter in parameters:
                if parameter.name not in taken:
                    own.append(_flag(parameter, title))
                    taken.add(parameter.name)
        vars(function)["__signature__"] = signature.replace(parameters=own)
        function.__annotations__ = {**function.__annotations__, **{each.name: each.annotation for each in own}}
        return function

    return add


def _flag(parameter: cards.Parameter, title: str) -> inspect.Parameter:
    kind = TYPES.get(parameter.kind, str)
    name = parameter.name
    dashed = name.replace("_", "-")
    declared = DECLARED.get(name, f"--{dashed}/--no-{dashed}" if parameter.default == "True" else f"--{dashed}")
    about = parameter.meaning[:1].upper() + parameter.meaning[1:]
    about += "; repeatable" if kind == list[str] else ""
    default = (
        f" Default: {parameter.default}." if parameter.default not in ("required", "None", "[]", "''", "False") else "."
    )
    option = typer.Option(
        declared,
        metavar=METAVARS.get(name),
        help=literal(about.rstrip(".") + (default if default == "." else "." + default)),
        rich_help_panel=title or None,
    )
    annotation = Annotated[typing.Optional[kind], option]  # type: ignore[valid-type]  # noqa: UP045
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def parsed(given: dict[str, Any]) -> dict[str, Any]:
    """The flags that were given, as values for a schema: lists are parted at ``|``, sizes read as width x height."""
    return {name: _value(name, value) for name, value in given.items() if value not in (None, [])}


def _value(name: str, value: Any) -> Any:
    if name in SIZES:
        return pixels(value, name)
    if name == "compose":
        return [_weighted(text) for text in value]
    if isinstance(value, list):
        return [part for text in value for part in str(text).split("|")]
    return (
        value.split("|") if isinstance(value, str) and name in (*CROPS, "guidance_interval", "temperature") else value
    )


def pixels(text: str, name: str = "size") -> tuple[int, int]:
    """Width and height from ``64x64``."""
    found = re.fullmatch(r"\s*(\d{1,9})\s*[xX]\s*(\d{1,9})\s*", text)
    if found is None:
        raise BadInput(f"--{name.replace('_', '-')} is {brief(text)}; write width x height in pixels, such as 64x64.")
    return int(found[1]), int(found[2])


def _weighted(text: str) -> tuple[str, str]:
    """A text and its weight from ``TEXT=WEIGHT``."""
    words, equals, weight = text.rpartition("=")
    if not equals:
        raise BadInput(f"--compose is {brief(text)}; write TEXT=WEIGHT, such as 'in the snow=1.5'.")
    return words, weight
