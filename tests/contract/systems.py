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
    "sdxl": "sdxl",
    "sd3": "sd3",
    "flux": "flux",
    "pixart": "pixart",
    "animatediff": "animatediff",
    "amused": "amused",
}
"""Tiny model -> the family it belongs to."""
FURTHER = {
    "sd2": "sd",
    "sd35": "sd3",
    "chroma": "chroma",
    "auraflow": "auraflow",
    "sana": "sana",
    "klein": "flux2-klein",
    "hidream": "hidream",
}
"""More of them, which systems meet in turn: see :func:`further`."""
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
    """The (system, model) on which a check of :data:`COVERED` runs, whose outcome hardly depends on the family.

    The checks take turns, so that each of them meets every model and every system, and every system meets one of them
    on every model, and two of them on a U-Net and on joint attention.
    """
    turn, found = COVERED.index(check), []
    for i, kind in enumerate(KINDS):
        keys = [key for key, other in PAIRS if other == kind]
        for k, key in enumerate(keys):
            if kind in TWO and all((key, other) in PAIRS for other in TWO):
                chosen = (list(SYSTEMS).index(key) + TWO.index(kind) + turn) % len(TWO) == 0
            else:
                chosen = kind in TWO or only(key) or len(keys) < len(COVERED) or (k + i) % len(COVERED) == turn
            if chosen:
                found.append((key, kind))
    return found + further(check)


def further(check: str) -> list[tuple[str, str]]:
    """Those of the models of :data:`FURTHER`: each system meets one of them that has what it needs, in one check. What
    is made for a model (adapters, experts) is tried on these by tests of its own."""
    return [pair for i, pair in enumerate(MET) if i % len(COVERED) == COVERED.index(check)]


def _met() -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for key, card in SYSTEMS.items():
        fitting = [kind for kind, name in FURTHER.items() if BY_NAME[name].capabilities.issuperset(card.needs)]
        if fitting and method(key).role != "adapter" and "models" not in method(key).Params.model_fields:
            found.append((key, fitting[len(found) % len(fitting)]))
    return found


MET = _met()
TWO = ("sd", "sd3")
COVERED = ("identity", "detaches", "batch_independent", "wide_pictures")


def once(check: str) -> list[tuple[str, str]]:
    """The (system, model) on which a check of :data:`ONCE` runs: every system on one model, a U-Net or one with joint
    attention, in turn from check to check."""
    found = []
    for k, key in enumerate(SYSTEMS):
        kinds = [kind for kind in ("sd", ("sd3", "flux")[k // 2 % 2]) if (key, kind) in PAIRS]
        kinds = kinds or [kind for other, kind in PAIRS if other == key][:1]
        found.append((key, kinds[(k + ONCE.index(check)) % len(kinds)]))
    return found


ONCE = (
    "detaches_when_the_denoiser_fails",
    "deterministic",
    "frees",
    "half_precision",
    "recipe",
    "without_guidance",
    "saves",
)
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
