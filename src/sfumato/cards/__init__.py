"""Cards and parameters: what every system says about itself as data, and how a system is found, built and recorded.

A *system* is one file ``sfumato/<room>/<key>.py`` holding one class; a larger one is a folder ``<room>/<key>/`` whose
``__init__.py`` holds it::

    @register
    class DAAM(Intervention):
        CARD = Card(key="daam", title="What the DAAM", ...)      # literals only: read without importing the file

        class Params(cards.Params):
            words: list[str] = Field(default=[], description="words or phrases to map; empty: every word")

        def __init__(self, **given):
            self.params = self.Params(**given)

The card is read from the source text, so listing every system imports neither torch nor the systems themselves. The
parameters are one typed schema: the command line, web controls, documentation and the shared tests come from it.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sfumato import valid
from sfumato.cards.parameters import Parameter, parameter_rows, parameters_of
from sfumato.cards.paths import FilePath, ModelPath, opens, refuse_unallowed
from sfumato.cards.source import Unreadable, parameters_in
from sfumato.cards.text import WITH_GRAMMAR, Template, parse_with
from sfumato.errors import BadInput, Conflict, UnknownName
from sfumato.startup import collector_paused
from sfumato.valid import brief

__all__ = [
    "CAPABILITIES",
    "MOST_SYSTEMS",
    "ROOMS",
    "WITH_GRAMMAR",
    "Card",
    "Field",
    "FilePath",
    "ModelPath",
    "Parameter",
    "Params",
    "System",
    "Template",
    "build",
    "default",
    "files_of",
    "from_recipe",
    "method",
    "methods",
    "parameter_rows",
    "parameters",
    "parameters_of",
    "parse_with",
    "refuse_files",
    "register",
    "to_recipe",
]

ROOT = Path(__file__).parents[1]

CAPABILITIES = {
    "pictures": "single pictures, not clips",
    "clips": "clips of several frames",
    "noise_path": "a path between noise and picture, as diffusion and flow models have",
    "differentiable_state": "latents that gradients reach",
    "text_attention": "attention from picture to text",
    "joint_attention": "attention in which text and picture share one sequence",
    "temporal_attention": "attention between frames",
    "linear_text_values": "attention whose values are a linear function of the text's embeddings",
    "h_space": "a U-Net with a middle block, its h-space",
    "mask_input": "a denoiser that sees a mask, such as that of toy-sd-inpaint or Stable Diffusion's inpainting "
    "checkpoints (blend redraws regions with any model)",
    "reference": "reference pictures beside the prompt",
    "classifier": "a classifier of pictures",
}
"""What a model may offer and a system may need, with the words of a refusal: "KEY needs ...; MODEL has none"."""

MOST_SYSTEMS = 100  # of one run

ROOMS = ("explain", "steer", "edit", "teach", "animate", "generate", "disentangle", "judge", "adapters")


@dataclass(frozen=True, kw_only=True)
class Card:
    """The facts of one system. All fields are literals in the source file.

    ``key`` is the file's name; ``verb`` one of :data:`ROOMS`; ``needs`` the :data:`CAPABILITIES` a model must have;
    ``defaults_from`` says where the default parameters come from; ``cost`` is stated in forward-equivalents
    (1 = one row through the denoiser); ``not_reproduced`` names what of the paper is missing here; ``example`` is a
    ``--with`` text that works with the prompt "a red cube and a blue ball" (left out: the key alone works);
    ``default_for`` the tasks it serves where nobody names a system (:func:`default`).
    """

    key: str
    title: str
    authors: str
    year: int
    verb: str
    needs: tuple[str, ...]
    defaults_from: str
    cost: str
    summary: str
    arxiv: str = ""
    not_reproduced: str = ""
    example: str = ""
    default_for: tuple[str, ...] = ()

    def __post_init__(self):
        if self.verb not in ROOMS:
            raise UnknownName("verb", self.verb, ROOMS)
        for need in self.needs:
            if need not in CAPABILITIES:
                raise UnknownName(f"capability needed by {self.key}", need, CAPABILITIES)
        object.__setattr__(self, "example", self.example or self.key)

    @property
    def paper(self) -> str:
        """Authors and year, short: ``Chefer et al. 2023``."""
        names = self.authors.split(", ")
        first = names[0].split(" ")[-1] if " et al" not in names[0] else names[0]
        return f"{self.authors if len(names) < 3 else f'{first} et al.'} {self.year}"


class Params(BaseModel):
    """Base of every system's parameters: unknown names, wrong kinds and values out of range become one-line errors.

    Declare fields with :func:`Field` (``description``, ``ge``, ``le``, ``json_schema_extra={"unit": "pixel"}``). A
    field that holds a list accepts a single value as well. Not-a-number and infinity are refused.
    """

    # the validator is built when it is first needed: listing and help need none
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)

    SYSTEM: ClassVar[str] = ""
    MOST: ClassVar[int] = valid.MOST  # items of one list
    RENAMED: ClassVar[dict[str, str]] = {}  # names that older recipes have, and what they are called today

    def __init__(self, /, **given: Any):
        for name, value in given.items():
            if wrong := valid.wrong(value, self.MOST):
                raise self._refusal(name, value, wrong)
        try:
            super().__init__(**given)
        except ValidationError as error:
            raise _one_line(self.SYSTEM, type(self), error) from None
        for name in given:
            if wrong := self._too_large(name, value := getattr(self, name, None)):
                raise self._refusal(name, value, wrong)

    @classmethod
    def _refusal(cls, name: str, value: Any, wrong: str) -> BadInput:
        of = f" of {cls.SYSTEM}" if cls.SYSTEM else ""
        return BadInput(f"{name.rstrip('_')}{of} is {brief(value)}: {wrong}.")

    @classmethod
    def _too_large(cls, name: str, value: Any) -> str:
        """What is wrong with whole numbers where the field itself has no upper limit: nobody waits for, or holds in
        memory, what they count."""
        field = cls.model_fields.get(name)
        if field is None or any(hasattr(each, "le") or hasattr(each, "lt") for each in field.metadata):
            return ""
        most = valid.LARGEST_SEED if "seed" in name else valid.LARGEST_COUNT
        numbers = value if isinstance(value, list | tuple) else [value]
        return next((f"the most is {most}" for each in numbers if isinstance(each, int) and each > most), "")

    @model_validator(mode="before")
    @classmethod
    def _wrap_single_values(cls, given: dict[str, Any]) -> dict[str, Any]:
        wrapped = dict(given)
        for name, value in given.items():
            field = cls.model_fields.get(name)
            if field is not None and isinstance(value, str | int | float) and _only_lists(field.annotation):
                wrapped[name] = [value]
        return wrapped


class System(Protocol):
    """Any system: its card and its checked parameters."""

    CARD: ClassVar[Card]
    params: Params


def _only_lists(annotation: Any) -> bool:
    """Whether every alternative of a type, None aside, is a list or a tuple."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return all(_only_lists(part) for part in typing.get_args(annotation) if part is not type(None))
    return (origin or annotation) in (list, tuple)


def _one_line(system: str, params: type[Params], error: ValidationError) -> BadInput | UnknownName:
    errors = error.errors()
    first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
    name = str(first["loc"][0]) if first["loc"] else "parameters"
    of = f" of {system}" if system else ""
    if first["type"] == "extra_forbidden":
        return UnknownName(f"parameter{of}", name, params.model_fields)
    inside = "".join(f"[{part}]" for part in first["loc"][1:] if isinstance(part, int))
    field = params.model_fields.get(name)
    if first["type"] == "missing":
        return BadInput(f"{name}{of} must be given: {field.description if field else ''}.")
    unit = (field.json_schema_extra or {}).get("unit") if field and isinstance(field.json_schema_extra, dict) else None
    reason = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:  # what several parameters say together
        return BadInput(" ".join(f"{reason}{of}.".split()))
    message = f"{name}{inside}{of} is {brief(first['input'])}: {reason[:1].lower()}{reason[1:]}"
    message += f" (unit: {unit})" if unit else ""
    message += f"; {name} is {field.description}" if field is not None and field.description else ""
    return BadInput(" ".join(message.split()) + ".")


# --- the registry ------------------------------------------------------------------------------------------------

_registered: dict[str, type] = {}


def register(cls: type) -> type:
    """Class decorator that makes a system known under ``cls.CARD.key``; classes outside this package are welcome."""
    card, params = getattr(cls, "CARD", None), getattr(cls, "Params", None)
    if not isinstance(card, Card):
        raise BadInput(f"{cls.__name__} cannot be registered: it needs CARD = Card(...).")
    if not (isinstance(params, type) and issubclass(params, Params)):
        raise BadInput(f"{cls.__name__} cannot be registered: it needs a nested class Params(sfumato.cards.Params).")
    known = _registered.get(card.key)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise Conflict(f"the key {card.key!r} is already taken by {known.__module__}.{known.__qualname__}.")
    params.SYSTEM = card.key
    _registered[card.key] = cls
    return cls


def methods(verb: str | None = None) -> dict[str, Card]:
    """The cards of all systems by key, those of one ``verb`` if given. Imports no system and no torch."""
    if verb is not None and verb not in ROOMS:
        raise UnknownName("verb", verb, ROOMS)
    found = dict(_shipped())
    found.update({key: cls.CARD for key, cls in _registered.items()})  # type: ignore[attr-defined]
    return {key: card for key, card in found.items() if verb is None or card.verb == verb}


def method(key: str) -> type[Any]:
    """The class of the system ``key`` (``-`` and ``_`` are the same). Raises UnknownName with the nearest keys."""
    key = key.strip().replace("-", "_")
    if key not in _registered:
        shipped = _shipped()
        if key not in shipped:
            raise UnknownName("method", key, methods())
        with collector_paused():
            importlib.import_module(f"sfumato.{shipped[key].verb}.{key}")
    return _registered[key]


def parameters(key: str) -> list[Parameter]:
    """The parameters of the system ``key``; those of a shipped one are read without importing it. Raises
    UnknownName."""
    card = _shipped().get(key.replace("-", "_"))
    if card is not None:
        with contextlib.suppress(Unreadable):
            return parameters_in(f"sfumato.{card.verb}.{card.key}")
    return parameters_of(method(key).Params)  # type: ignore[attr-defined]


def default(task: str) -> str:
    """The key of the system for a task - "explain", "edit", "edit mask", "segment" - by default.

    Raises UnknownName for a task that no card has."""
    found = {each: key for key, card in methods().items() for each in card.default_for}
    if task not in found:
        raise UnknownName("task", task, found)
    return found[task]


@functools.cache
def _shipped() -> dict[str, Card]:
    return _cards_under(ROOT)


def _cards_under(root: Path) -> dict[str, Card]:
    """The cards in ``root/<room>/<key>.py`` and ``root/<room>/<key>/__init__.py``, by key."""
    found = {}
    for room in ROOMS:
        sources = [*(root / room).glob("[a-z]*.py"), *(root / room).glob("[a-z]*/__init__.py")]
        cards = [card for card in map(_card_in, sources) if card is not None]
        found.update({card.key: card for card in sorted(cards, key=lambda card: card.key)})
    return found


def _card_in(path: Path) -> Card | None:
    """The card of one source file, evaluated without importing it, or None when the file holds no system."""
    source = path.read_text(encoding="utf-8")
    if "CARD = Card(" not in source:
        return None
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "CARD":
            facts = {word.arg: ast.literal_eval(word.value) for word in node.value.keywords}  # type: ignore[attr-defined]
            return Card(**facts)
    return None


# --- from text and back ---------------------------------------------------------------------------------------------


def build(text: str) -> System:
    """Construct a system from ``KEY`` or ``KEY:name=value,...`` (grammar: :func:`parse_with`)."""
    key, given = parse_with(text)
    return _constructed(method(key), given)


def to_recipe(system: Any) -> dict[str, Any]:
    """``{"method": key, "params": {...}}`` in plain JSON values, enough to build the same system again. Where a run
    has completed the parameters, by files that were found, a system has them as ``resolved``."""
    params = getattr(system, "resolved", system.params)
    return {"method": system.CARD.key, "params": params.model_dump(mode="json")}


def from_recipe(recipe: dict[str, Any], allow: Sequence[str | Path] = ()) -> Any:
    """The system that :func:`to_recipe` described. Raises BadInput, UnknownName for anything else, and NotAllowed for
    one that opens files which ``allow`` does not name (:func:`refuse_files`)."""
    refuse_files([recipe], allow)
    key, params = _described(recipe)
    return _constructed(method(key), params)


def _constructed(cls: Any, given: dict[str, Any]) -> Any:
    """A system from parameters alone: what else its constructor takes are objects, which no text can be."""
    for name in given:
        if name not in cls.Params.model_fields:
            raise UnknownName(f"parameter of {cls.CARD.key}", name, cls.Params.model_fields)
    return cls(**given)


def refuse_files(
    systems: Sequence[str | dict[str, Any]], allow: Sequence[str | Path], whose: str = "the recipe"
) -> None:
    """Raises NotAllowed where systems, described by recipes or ``--with`` texts, open files of this computer that
    ``allow`` - files, or folders that they lie in - does not name. Built-in models and embedded pictures are none."""
    refuse_unallowed(files_of(systems), allow, whose)


def files_of(systems: Sequence[str | dict[str, Any]]) -> list[tuple[str, str, str]]:
    """(system, parameter, file) for every file of this computer that described systems open."""
    found = []
    for each in systems:
        key, params = parse_with(each) if isinstance(each, str) else _described(each)
        found += [(key, *named) for named in opens(method(key).Params, params)]  # type: ignore[attr-defined]
    return found


def _described(recipe: Any) -> tuple[str, dict[str, Any]]:
    key, params = (recipe.get("method"), recipe.get("params", {})) if isinstance(recipe, dict) else (None, None)
    if not (isinstance(key, str) and isinstance(params, dict)):
        raise BadInput(f"{brief(recipe)} describes no system; it must be {{'method': key, 'params': {{...}}}}.")
    renamed = method(key).Params.RENAMED  # type: ignore[attr-defined]
    return key, {renamed.get(name, name): value for name, value in params.items()}
