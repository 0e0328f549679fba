"""Every registered system that takes part in drawing, and the tiny models that it runs on."""

from __future__ import annotations

import functools

from sfumato import cards
from sfumato.cards import build, method, methods
from sfumato.models.families import families
from sfumato.sampling import Intervention

KINDS = {
    "sd": "sd",
    "inpaint": "sd_inpaint",
    "sd2": "sd",
    "sdxl": "sdxl",
    "sd3": "sd3",
    "sd35": "sd3",
    "flux": "flux",
    "pixart": "pixart",
    "chroma": "chroma",
    "auraflow": "auraflow",
    "animatediff": "animatediff",
    "amused": "amused",
}
"""Tiny model -> the family it belongs to."""
BY_NAME = {family.name: family for family in families().values()}

SYSTEMS = {key: card for key, card in methods().items() if issubclass(method(key), Intervention)}
PAIRS = [
    (key, kind)
    for key, card in SYSTEMS.items()
    for kind, family in KINDS.items()
    if BY_NAME[family].capabilities.issuperset(card.needs)
]


def only(key: str) -> bool:
    """Whether one of these models alone offers what the system needs."""
    return sum(other == key for other, _ in PAIRS) == 1


def cover(check: str) -> list[tuple[str, str]]:
    """The (system, model) on which a check runs whose outcome hardly depends on the family.

    Every system is checked on a U-Net and on joint attention; on the other models the checks in :data:`COVERED` take
    turns, so that each of them meets every model and every system meets one of them on every model.
    """
    turn, found = COVERED.index(check), []
    for i, kind in enumerate(KINDS):
        keys = [key for key, other in PAIRS if other == kind]
        everything = kind in ("sd", "sd3") or len(keys) < len(COVERED)
        found += [
            (key, kind) for k, key in enumerate(keys) if everything or only(key) or (k + i) % len(COVERED) == turn
        ]
    return found


COVERED = ("identity", "detaches", "batch_independent", "wide_pictures")
# properties that do not depend on the family are checked on a U-Net and, in turn, on one of two with joint attention
SOME = [
    (key, kind)
    for key, kind in PAIRS
    if kind == "sd" or only(key) or kind == ("sd3", "flux")[list(SYSTEMS).index(key) % 2]
]
ELSEWHERE = [
    (key, kind)
    for key, card in SYSTEMS.items()
    for kind, family in KINDS.items()
    if not BY_NAME[family].capabilities.issuperset(card.needs)
]


@functools.cache
def maker(key: str):
    """The same function each time: what its system gives alone is remembered by it."""
    return lambda: build(SYSTEMS[key].example)


@functools.cache
def weakener(key: str):
    """The system at strength 0 (an adapter: at scale 0), if it has one."""
    dial = next((name for name in ("strength", "scale") if name in method(key).Params.model_fields), None)
    if dial is None:
        return None
    name, given = cards.parse_with(SYSTEMS[key].example)
    return lambda: method(name)(**{**given, dial: 0})
