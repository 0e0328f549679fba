"""Was what the prompt asked for drawn? Presence, attribute binding, counts and relations, from a judge's readings.

A toy counts once: two wanted red cubes need two red cubes in the picture (maximum matching of wanted and read toys).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from sfumato.errors import BadInput
from sfumato.metrics import stats
from sfumato.toybox import COLORS, PATTERNS, SHAPES, SIZES, Caption, Scene
from sfumato.toybox.oracle.toy_judge import ObjectReading, SceneReading

_KINDS = {"shape": SHAPES, "color": COLORS, "pattern": PATTERNS, "size": SIZES}


@dataclass(frozen=True)
class RequestedToy:
    """A toy the prompt asks for; None leaves an attribute free."""

    shape: str | None = None
    color: str | None = None
    pattern: str | None = None
    size: str | None = None

    @classmethod
    def parse(cls, words: str | Iterable[str]) -> RequestedToy:
        """From words such as ``"a small red striped cube"``; words that name no attribute are skipped."""
        found: dict[str, str] = {}
        for word in words.lower().split() if isinstance(words, str) else words:
            for kind, allowed in _KINDS.items():
                if word in allowed:
                    found[kind] = word
        if not found:
            raise BadInput(f"no toy is described by {words!r}; use words such as 'red cube'.")
        return cls(**found)

    def only(self, *names: str) -> RequestedToy:
        """The same request with every attribute but ``names`` left free."""
        return RequestedToy(**{field.name: getattr(self, field.name) for field in fields(self) if field.name in names})

    def fits(self, toy: ObjectReading) -> bool:
        """Whether a toy that was read is what is wanted."""
        return toy.has(shape=self.shape, color=self.color, pattern=self.pattern, size=self.size)


def requested_toys(source: Scene | Caption) -> tuple[RequestedToy, ...]:
    """What a scene shows, or what a caption names (in the order of its phrases), as requests."""
    if isinstance(source, Scene):
        return tuple(RequestedToy(toy.shape, toy.color, toy.pattern, toy.size) for toy in source.toys)
    named = [phrase for phrase in source.phrases if phrase.object is not None]
    return tuple(RequestedToy.parse([word.text for word in (*phrase.modifiers, phrase.head)]) for phrase in named)


@dataclass(frozen=True)
class Check:
    """One picture against its requests.

    Attributes:
        present: per request, whether its shape is there (each toy read serves one request).
        bound: per request, whether a toy with all its wanted attributes is there.
        leaked: per request, whether it is not bound and a toy of its shape has the colour of another request.
        counted: whether as many toys were read as wanted.
    """

    present: tuple[bool, ...]
    bound: tuple[bool, ...]
    leaked: tuple[bool, ...]
    counted: bool

    @property
    def all_present(self) -> bool:
        """Every wanted shape is there."""
        return all(self.present)

    @property
    def all_bound(self) -> bool:
        """Every request is there with all its attributes."""
        return all(self.bound)


def check(
    reading: SceneReading, requests: Sequence[RequestedToy], attributes: Sequence[str] = ("shape", "color")
) -> Check:
    """Compares a reading with requests on ``attributes`` (those a request leaves free never count against it)."""
    if not requests:
        raise BadInput("check: requests is empty.")
    toys = reading.objects
    strict = [request.only(*attributes) for request in requests]
    shapes = [request.only("shape") for request in requests]
    bound = _matched(strict, toys)
    leaked = []
    for i, request in enumerate(requests):
        others = {other.color for j, other in enumerate(requests) if j != i} - {request.color, None}
        leaked.append(not bound[i] and any(shapes[i].fits(toy) and toy.color in others for toy in toys))
    return Check(_matched(shapes, toys), bound, tuple(leaked), len(toys) == len(requests))


@dataclass(frozen=True)
class Rates:
    """Shares over many pictures, each with its Wilson interval."""

    present: stats.Interval
    all_present: stats.Interval
    bound: stats.Interval
    all_bound: stats.Interval
    leaked: stats.Interval
    counted: stats.Interval

    def to_json(self) -> dict[str, object]:
        """Every share as plain numbers."""
        return {field.name: getattr(self, field.name).to_json() for field in fields(self)}


def rates(checks: Sequence[Check]) -> Rates:
    """Shares of ``present``, ``bound``, ``leaked`` per request, of the others per picture."""
    return Rates(
        present=stats.share([hit for one in checks for hit in one.present]),
        all_present=stats.share([one.all_present for one in checks]),
        bound=stats.share([hit for one in checks for hit in one.bound]),
        all_bound=stats.share([one.all_bound for one in checks]),
        leaked=stats.share([hit for one in checks for hit in one.leaked]),
        counted=stats.share([one.counted for one in checks]),
    )


def find(reading: SceneReading, request: RequestedToy) -> ObjectReading | None:
    """The most confident toy that fits a request, or None."""
    return next((toy for toy in reading.objects if request.fits(toy)), None)


RELATIONS: dict[str, Callable[[ObjectReading, ObjectReading], bool]] = {
    # boxes are (x0, y0, x1, y1); the camera looks down, so what stands nearer touches the ground lower in the picture
    "left of": lambda a, b: a.box[0] + a.box[2] < b.box[0] + b.box[2],
    "right of": lambda a, b: a.box[0] + a.box[2] > b.box[0] + b.box[2],
    "in front of": lambda a, b: a.box[3] > b.box[3],
    "behind": lambda a, b: a.box[3] < b.box[3],
}


def related(reading: SceneReading, first: RequestedToy, relation: str, second: RequestedToy) -> bool:
    """Whether two different toys that fit ``first`` and ``second`` stand in ``relation`` in the picture."""
    if relation not in RELATIONS:
        raise BadInput(f"related: relation={relation!r}; allowed: {', '.join(RELATIONS)}.")
    holds = RELATIONS[relation]
    toys = reading.objects
    return any(a is not b and first.fits(a) and second.fits(b) and holds(a, b) for a in toys for b in toys)


def _matched(requests: Sequence[RequestedToy], toys: Sequence[ObjectReading]) -> tuple[bool, ...]:
    """Which request is served in a maximum matching of requests and toys; earlier requests are served first."""
    from scipy.optimize import linear_sum_assignment

    # a request that comes earlier is worth more, so the heaviest matching is the largest one that prefers it
    worth = np.array([[(len(requests) - i) * request.fits(toy) for toy in toys] for i, request in enumerate(requests)])
    worth = worth.reshape(len(requests), len(toys))
    served = {int(i) for i, j in zip(*linear_sum_assignment(worth, maximize=True), strict=True) if worth[i, j]}
    return tuple(i in served for i in range(len(requests)))
