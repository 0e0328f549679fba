"""What prompts of other programs say besides what a picture shows: ``AND`` and ``<lora:name:0.8>``.

``a cat AND a dog :0.7`` composes two texts (Liu et al. 2022, equation 11): each is guided by itself, with a weight
times the scale of guidance. A1111's web UI reads both notations in the same way. Word weights and ``BREAK`` are read
further on, by :mod:`sfumato.text.weights`.
"""

from __future__ import annotations

import functools
import math
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePath

from sfumato.errors import BadInput, NotSupported
from sfumato.valid import brief

__all__ = ["Composition", "PlainWords", "adapter_tags", "read_composition", "refuse_dialect", "warn_of_plain_words"]

_AND = re.compile(r"\bAND\b")
_WEIGHT = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)")
_TAG = re.compile(r"\s{0,20}<(lora|lyco|hypernet):([^<>]*)>", re.IGNORECASE)
_BRACKETED = re.compile(r"\s{0,20}\(\s{0,20}(<lora:[^<>]*>)\s{0,20}(?::[\s\d.]{0,20})?\)", re.IGNORECASE)
#: what other programs act on: prompt editing and alternatives, wildcards, ComfyUI's embeddings, regions, other scripts
_UNREAD = re.compile(
    r"(?<!\\)\[(?:[^\[\]:]{0,80}:){1,2}\s*\d*\.?\d+\s*\]|(?<!\\)\[[^\[\]|]{0,80}\|[^\[\]]{0,200}\]"
    r"|\{[^{}|]{0,80}\|[^{}]{0,200}\}|(?<!\w)__[\w/*-]{1,80}?__(?!\w)|\bembedding:[\w.-]{1,80}"
    r"|\b(?:AND_[A-Z]+|ADDBASE|ADDCOMM|ADDROW|ADDCOL)\b"
    r"|<(?:wildcard|random|alternate|fromto|segment|object|region|preset)\b[^<>]{0,200}>"
)


@dataclass(frozen=True)
class Composition:
    """A prompt that composes: its first ``text`` with its ``weight``, and (text, weight) of all ``others``. Weights are
    shares of the scale of guidance."""

    text: str
    weight: float
    others: tuple[tuple[str, float], ...]


@functools.lru_cache(maxsize=4096)
def read_composition(prompt: str) -> Composition:
    """Reads ``AND``; a prompt without it is its own first text, of weight 1. Raises BadInput for an empty side and for
    weights that are no finite numbers."""
    parts = _AND.split(prompt)
    if len(parts) == 1:
        return Composition(prompt, 1.0, ())
    read = []
    for part in parts:
        head, colon, number = part.rpartition(":")
        text, weight = (head, float(number)) if colon and _WEIGHT.fullmatch(number.strip()) else (part, 1.0)
        if not text.strip():
            raise BadInput(
                f"AND composes two texts, but one side of it is empty in {prompt[:80]!r}; write it as 'and'."
            )
        if not math.isfinite(weight):
            raise BadInput(f"the weight of {text.strip()[:80]!r} is {weight:g}; it must be a finite number.")
        read.append((text.strip(), weight))
    (text, weight), *others = read
    return Composition(text, weight, tuple(others))


TAGGED = "lora"
"""The system that ``<lora:name:scale>`` stands for."""


def adapter_tags(prompt: str) -> tuple[str, tuple[tuple[str, float], ...]]:
    """The prompt without its ``<lora:name:scale>``, and (name, scale) of each, 1 where no scale is named.

    Raises NotSupported for ``<lyco:...>``, ``<hypernet:...>`` and settings per network, BadInput for what is no name or
    number.
    """
    found = []
    for kind, inside in _TAG.findall(prompt):
        tag = brief(f"<{kind}:{inside}>")[1:-1]
        if kind.lower() == "hypernet":
            raise NotSupported(f"{tag}: hypernetworks are not supported; leave it out.")
        if kind.lower() == "lyco":
            raise NotSupported(
                f"{tag}: lyco is not supported; write <lora:{brief(inside)[1:-1]}>, which reads LoHa and LoKr, too."
            )
        name, *numbers = (part.strip() for part in inside.split(":"))
        if not name or PurePath(name).name != name or "\\" in name:
            raise BadInput(
                f"{tag}: {brief(name)} is no name of an adapter; give a file by --with lora:file=PATH instead."
            )
        if len(numbers) > 1:
            raise NotSupported(f"{tag}: only one scale, of text encoder and denoiser alike, is read: <lora:NAME:0.8>.")
        try:
            scale = float(numbers[0]) if numbers else 1.0
        except ValueError:
            scale = math.nan
        if not math.isfinite(scale):
            raise BadInput(f"{tag}: {brief(numbers[0])} is no scale; write a number, as in <lora:NAME:0.8>.")
        found.append((name, scale))
    plain = _TAG.sub("", _BRACKETED.sub(r"\1", prompt)) if found else prompt
    return (plain.strip(), tuple(found)) if found else (prompt, ())


def refuse_dialect(text: str, what: str) -> None:
    """Raise BadInput where a text that neither composes nor brings adapters says so."""
    tag = _TAG.search(text)
    if tag:
        raise BadInput(f"{tag[0].strip()} stands in {what}, where no adapter is read; write it in the prompt.")
    if _AND.search(text):
        raise BadInput(f"AND composes prompts, and stands in {what}; write it as 'and', or join texts by commas.")


class PlainWords(UserWarning):
    """A prompt holds what another program acts on and what is drawn as plain words here."""


def warn_of_plain_words(texts: Iterable[str]) -> None:
    """Warn, once for all ``texts``, of notations that are not read."""
    unread = list(dict.fromkeys(found[0] for text in texts for found in _UNREAD.finditer(text)))
    if unread:
        shown = ", ".join(brief(each) for each in unread[:5]) + (", ..." if len(unread) > 5 else "")
        warnings.warn(
            f"{shown}: another program's notation that is not read here, so it is drawn as plain words; write what the "
            "picture shall show.",
            PlainWords,
            stacklevel=4,
        )
