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


def take_distilled(recipe: dict[str, Any], found: dict[str, Any], name: str) -> list[str]:
    """Takes over the guidance ``found`` of a model that is distilled from it, unless there is CFG beside it. Returns
    what is dropped: the setting of this ``name``, or a negative prompt, for such models take none."""
    if recipe.get("guidance", 1.0) > 1:
        return [name]
    recipe |= found
    return [NO_EFFECT] if recipe.pop("negative", None) else []


def with_dropped(recipe: dict[str, Any], dropped: list[str]) -> dict[str, Any]:
    """A recipe that lists what has no counterpart in it, if there is any."""
    return recipe | ({"dropped": list(dict.fromkeys(dropped))} if dropped else {})


def short(value: str | float) -> bool:
    """Whether a number has no more digits than Python writes out."""
    return isinstance(value, str) or abs(value) < 1e300
