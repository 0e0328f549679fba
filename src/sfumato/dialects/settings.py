"""The numbers in the settings of a recipe, whichever program wrote them."""

from __future__ import annotations

import contextlib
import re
from typing import Any

NO_EFFECT = "the negative prompt, which has no effect at CFG 1"


def settings(known: dict[str, str]) -> dict[str, Any]:
    """The numbers and the model in settings, by A1111's names in lower case; what cannot be read is left out."""
    found: dict[str, Any] = {}
    for key, name, read in (("steps", "steps", int), ("guidance", "cfg scale", float), ("seed", "seed", int)):
        with contextlib.suppress(KeyError, ValueError):
            found[key] = read(known[name][:40])
    if sides := re.fullmatch(r"\(?(\d{1,5})\s*[xX×,]\s*(\d{1,5})\)?", known.get("size", "").strip()):
        found["size"] = [int(sides[1]), int(sides[2])]
    if known.get("model"):
        found["named_model"] = known["model"][:200]
    return found


def short(value: str | float) -> bool:
    """Whether a number has no more digits than Python writes out."""
    return isinstance(value, str) or abs(value) < 1e300
