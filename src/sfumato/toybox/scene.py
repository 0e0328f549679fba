"""Scenes as plain data: toys on a ground under a sky, seen by a camera, lit by one light.

World axes: x right, y up, z away from a camera at azimuth 0; the ground is the plane y = 0; lengths are in world units
(a large toy is 1.25 tall); angles are in degrees. A :class:`Scene` is immutable; every edit returns a new one, so
that a *counterfactual* - the same scene with one thing changed - is one call away.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from .. import valid
from ..errors import BadInput, NoMatch, UnknownName

if TYPE_CHECKING:
    import numpy as np

SHAPES = ("ball", "cube", "cylinder", "cone", "ring", "cross")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")
PATTERNS = ("plain", "striped", "dotted", "checkered")
SIZES = ("small", "large")
GROUNDS = ("grass", "sand", "snow", "wood", "tiles")
SKIES = ("day", "sunset", "night", "fog", "clouds")
SPLITS = ("train", "heldout", "any")

SCALE = {"small": 0.82, "large": 1.25}  # height of a toy in world units
_WORDS = {"shape": SHAPES, "color": COLORS, "pattern": PATTERNS, "size": SIZES}


def _check_word(kind: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UnknownName(kind, str(value), allowed)


def _check_number(kind: str, value: float, low: float, high: float) -> None:
    if not isinstance(value, int | float) or not math.isfinite(value) or not low <= value <= high:
        raise BadInput(f"{kind} must be a number from {low} to {high}, got {value!r}.")


@dataclass(frozen=True)
class Toy:
    """One toy standing at (x, z) on the ground, turned by ``yaw`` degrees about the vertical; ``gloss`` in [0, 1]."""

    shape: str
    color: str
    pattern: str = "plain"
    size: str = "large"
    x: float = 0.0
    z: float = 0.0
    yaw: float = 0.0
    gloss: float = 0.4

    def __post_init__(self):
        for kind, allowed in _WORDS.items():
            _check_word(kind, getattr(self, kind), allowed)
        for kind, bound in (("x", 50.0), ("z", 50.0), ("yaw", 360.0)):
            _check_number(kind, getattr(self, kind), -bound, bound)
        _check_number("gloss", self.gloss, 0.0, 1.0)

    @property
    def scale(self) -> float:
        return SCALE[self.size]

    @property
    def tones(self) -> tuple[tuple[float, float, float], tuple[float, float, float]] | None:
        """First and second colour in [0, 1], where the toy has its own; None: those of its colour's name."""
        return None

    @property
    def surface(self) -> str:
        """What is drawn on it."""
        return self.pattern


@dataclass(frozen=True)
class Camera:
    """A pinhole camera looking at the point (0, 0.45, 0) from 6 units away; at ``zoom`` 1 it sees 3.5 units across."""

    azimuth: float = 0.0
    elevation: float = 10.0
    zoom: float = 1.0

    def __post_init__(self):
        _check_number("camera azimuth", self.azimuth, -360, 360)
        _check_number("camera elevation", self.elevation, 2, 85)
        _check_number("camera zoom", self.zoom, 0.1, 10)


@dataclass(frozen=True)
class Light:
    """One distant light; azimuth 0 stands behind the camera, positive to its right; elevation above the horizon."""

    azimuth: float = 40.0
    elevation: float = 50.0

    def __post_init__(self):
        _check_number("light azimuth", self.azimuth, -360, 360)
        _check_number("light elevation", self.elevation, 5, 90)


@dataclass(frozen=True)
class Scene:
    """Toys, ground, sky, camera and light. Plain data: ``to_json`` and ``from_json`` are exact inverses."""

    toys: tuple[Toy, ...]
    ground: str = "grass"
    sky: str = "day"
    camera: Camera = Camera()
    light: Light = Light()

    def __post_init__(self):
        object.__setattr__(self, "toys", tuple(self.toys))
        _check_word("ground", self.ground, GROUNDS)
        _check_word("sky", self.sky, SKIES)

    # -- finding and editing ------------------------------------------------------------------------------------------
    def index(self, object: int | str) -> int:
        """Index of a toy given as an index or as words that describe exactly one toy, such as ``"red cube"``.

        Raises:
            NoMatch: no toy, or more than one, fits; the message lists the toys.
        """
        here = ", ".join(f"{i}: {t.size} {t.color} {t.pattern} {t.shape}" for i, t in enumerate(self.toys)) or "no toys"
        if isinstance(object, int):
            if -len(self.toys) <= object < len(self.toys):
                return object % len(self.toys)
            raise NoMatch(f"object {object} is not in this scene; it has {here}.")
        words = [w for w in object.lower().split() if w not in ("a", "an", "the")]
        hits = [i for i, t in enumerate(self.toys) if words and set(words) <= {t.shape, t.color, t.pattern, t.size}]
        if len(hits) != 1:
            raise NoMatch(f"object {object!r} fits {'no toy' if not hits else 'several toys'}; this scene has {here}.")
        return hits[0]

    def replace(self, object: int | str | None = None, **changes: Any) -> Scene:
        """The same scene with fields of one toy changed, or, without ``object``, fields of the scene itself."""
        target = self if object is None else self.toys[self.index(object)]
        known = [f.name for f in fields(target)]
        for name in changes:
            if name not in known:
                raise UnknownName("scene field" if object is None else "toy field", name, known)
        if object is None:
            return replace(self, **changes)
        i = self.index(object)
        return replace(self, toys=(*self.toys[:i], replace(self.toys[i], **changes), *self.toys[i + 1 :]))

    def add(self, toy: Toy) -> Scene:
        """The same scene with one more toy (it gets the last index)."""
        return replace(self, toys=(*self.toys, toy))

    def remove(self, object: int | str) -> Scene:
        """The same scene without one toy."""
        i = self.index(object)
        return replace(self, toys=(*self.toys[:i], *self.toys[i + 1 :]))

    def move(self, object: int | str, dx: float = 0.0, dz: float = 0.0) -> Scene:
        """The same scene with one toy moved by (dx, dz) world units on the ground."""
        toy = self.toys[self.index(object)]
        return self.replace(object, x=toy.x + dx, z=toy.z + dz)

    # -- relations, as the camera sees them ---------------------------------------------------------------------------
    def view(self, toy: Toy) -> tuple[float, float]:
        """(right, away): the toy's position on the ground along the camera's right and viewing directions."""
        a = math.radians(self.camera.azimuth)
        return toy.x * math.cos(a) - toy.z * math.sin(a), toy.x * math.sin(a) + toy.z * math.cos(a)

    def picture_x(self, toy: Toy) -> float:
        """Horizontal picture coordinate of the toy's centre in units of half the picture width (-1 left, 1 right)."""
        right, away = self.view(toy)
        e = math.radians(self.camera.elevation)
        depth = DISTANCE + away * math.cos(e) - (toy.scale / 2 - LOOK_HEIGHT) * math.sin(e)
        return right / depth * DISTANCE / (VIEW_WIDTH / 2) * self.camera.zoom

    def relation(self, first: int | str, second: int | str) -> str:
        """How ``first`` stands to ``second`` in the picture: left of, right of, in front of, behind or next to."""
        a, b = self.toys[self.index(first)], self.toys[self.index(second)]
        across = self.picture_x(a) - self.picture_x(b)
        away = self.view(a)[1] - self.view(b)[1]
        if abs(across) >= 0.3:
            return "left of" if across < 0 else "right of"
        if abs(away) >= 0.5:
            return "in front of" if away < 0 else "behind"
        return "next to"

    # -- exchange -----------------------------------------------------------------------------------------------------
    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Scene:
        """Inverse of :meth:`to_json`. Raises BadInput on anything that is not a scene."""
        try:
            raw = valid.loads(text)
            return cls(
                toys=tuple(Toy(**t) for t in raw.pop("toys")),
                camera=Camera(**raw.pop("camera", {})),
                light=Light(**raw.pop("light", {})),
                **raw,
            )
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise BadInput(f"this text is not a toybox scene: {error}.") from None


DISTANCE = 6.0  # from the camera to the point it looks at
LOOK_HEIGHT = 0.45
VIEW_WIDTH = 3.5  # world units across the picture at that point, zoom 1


def is_held_out(toy: Toy) -> bool:
    """Whether this colour-shape-pattern combination never occurs in training scenes (about one in ten)."""
    code = 3 * COLORS.index(toy.color) + 7 * SHAPES.index(toy.shape) + 5 * PATTERNS.index(toy.pattern)
    return code % 11 == 4


def _sample_toy(rng: np.random.Generator, split: str) -> Toy:
    while True:
        toy = Toy(
            shape=SHAPES[rng.integers(len(SHAPES))],
            color=COLORS[rng.integers(len(COLORS))],
            pattern=PATTERNS[rng.choice(4, p=(0.55, 0.15, 0.15, 0.15))],
            size=SIZES[rng.integers(2)],
            yaw=round(float(rng.uniform(-40, 40)), 1),
            gloss=round(float(rng.uniform(0, 1)), 2),
        )
        if split == "any" or is_held_out(toy) == (split == "heldout"):
            return toy


def _stand(rng: np.random.Generator, toys: list[Toy], camera: Camera) -> Iterator[Toy]:
    """Places toys where the camera sees them, apart from one another on the ground and in the picture."""
    a = math.radians(camera.azimuth)
    placed: list[tuple[float, float, float]] = []
    for toy in toys:
        reach = VIEW_WIDTH / 2 / camera.zoom - 0.68 * toy.scale
        for attempt in range(200):
            right, away = float(rng.uniform(-reach, reach)), float(rng.uniform(-0.9, 0.9))
            shrink = 1 - attempt / 400  # crowded scenes may stand closer after many tries, but never inside one another
            if all(
                math.hypot(right - r, away - w) > 0.62 * (toy.scale + s)
                and abs(right - r) > 0.45 * (toy.scale + s) * shrink
                for r, w, s in placed
            ):
                break
        else:
            raise BadInput(f"{len(toys)} toys do not fit in view; ask for fewer.")
        placed.append((right, away, toy.scale))
        x, z = right * math.cos(a) + away * math.sin(a), -right * math.sin(a) + away * math.cos(a)
        yield replace(toy, x=round(x, 3), z=round(z, 3))


def sample_scene(rng: np.random.Generator, toys: int | None = None, split: str = "train") -> Scene:
    """Draws a scene.

    Args:
        rng: source of all randomness.
        toys: number of toys, 1 to 4; None draws 1, 2 or 3 with probabilities 0.45, 0.45, 0.1.
        split: "train" (no held-out combination), "heldout" (only held-out combinations) or "any".
    """
    _check_word("split", split, SPLITS)
    count = toys if toys is not None else int(rng.choice((1, 2, 3), p=(0.45, 0.45, 0.1)))
    if not 0 <= count <= 4:
        raise BadInput(f"toys must be from 0 to 4, got {count}.")
    camera = Camera(
        azimuth=round(float(rng.uniform(-25, 25)), 1),
        elevation=round(float(rng.uniform(4, 15)), 1),
        zoom=round(float(rng.uniform(0.95, 1.1)), 3),
    )
    light = Light(
        azimuth=round(float(rng.uniform(-75, 75)), 1),
        elevation=round(float(rng.uniform(35, 65)), 1),
    )
    ground, sky = GROUNDS[rng.integers(len(GROUNDS))], SKIES[rng.integers(len(SKIES))]
    while True:
        kinds = [_sample_toy(rng, split) for _ in range(count)]
        # A crowd of large toys may not fit; draw the crowd again rather than squeeze it.
        try:
            return Scene(tuple(_stand(rng, kinds, camera)), ground, sky, camera, light)
        except BadInput:
            continue
