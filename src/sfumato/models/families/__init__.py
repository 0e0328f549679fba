"""The families of models that sfumato knows: every file of this folder, found by itself. Nothing outside may know the
class names of checkpoints."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sfumato.errors import NotSupported
from sfumato.models.families.base import Family, TextStream
from sfumato.models.families.unsupported import UNSUPPORTED

__all__ = [
    "UNSUPPORTED",
    "Family",
    "TextStream",
    "families",
    "families_with",
    "family_of",
    "offering",
    "served_as",
    "siblings",
]


def families() -> dict[str, type[Family]]:
    """All families by the diffusers pipeline classes that they serve: those of this folder, and whatever subclass of
    :class:`Family` the user has defined."""
    _import_shipped()
    return {pipeline: family for family in _below(Family) for pipeline in family.__dict__.get("pipeline_classes", ())}


def siblings() -> dict[str, tuple[str, str]]:
    """Pipeline classes whose parts make a pipeline of a known family -> (its class, what is not followed)."""
    _import_shipped()
    return {name: other for family in _below(Family) for name, other in family.__dict__.get("siblings", {}).items()}


def served_as(pipeline_class: str, settings: Mapping[str, Any] | None = None) -> tuple[str, str]:
    """The class of a known family as which a pipeline class with these ``settings`` is served, and what is not
    followed; the class itself where none is known."""
    family = families().get(pipeline_class)
    if family is not None and family.told_by.items() <= dict(settings or {}).items():
        return pipeline_class, ""
    return siblings().get(pipeline_class, (pipeline_class, ""))


def family_of(pipeline_class: str, settings: Mapping[str, Any] | None = None) -> type[Family]:
    """The family that serves a diffusers pipeline class with these ``settings``. Raises `NotSupported` with the list of
    known ones."""
    known = families()
    other, _ = served_as(pipeline_class, settings)
    if other != pipeline_class:
        raise NotSupported(
            f"{pipeline_class} is served as {other}, which has the same parts: Model({other}.from_pipe(pipe)), or load "
            "its folder."
        )
    if pipeline_class not in known:
        if reason := UNSUPPORTED.get(pipeline_class):
            raise NotSupported(f"{pipeline_class} is not supported: {reason}.")
        raise NotSupported(f"model family {pipeline_class!r} is not supported; known: {', '.join(sorted(known))}.")
    return known[pipeline_class]


def offering(needs: Iterable[str]) -> list[str]:
    """Names, in alphabetical order, of the families of this folder that offer all of the capabilities ``needs``."""
    shipped = {family for family in families().values() if family.__module__.startswith(__name__)}
    return sorted(family.name for family in shipped if family.capabilities.issuperset(needs))


def families_with(*needs: str) -> str:
    """The end of a refusal: on which families it would work."""
    names = ", ".join(offering(needs))
    return f"it works with the families {names}" if names else "no family here would do"


@functools.cache
def _import_shipped() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


def _below(family: type[Family]) -> Iterator[type[Family]]:
    for child in family.__subclasses__():
        yield child
        yield from _below(child)
