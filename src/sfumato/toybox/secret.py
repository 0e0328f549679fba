"""Secret toys: things that no caption names, to be taught. What they look like is known exactly.

A *type A* toy lies inside what a model that was trained on the toybox has seen, but between its words: a hue halfway
between two colours that have names, and a size between small and large. A *type B* toy wears a texture that was never
rendered for training. Both stand in scenes like any other toy; captions speak of them by their shape alone.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..errors import BadInput
from ..rng import sequence
from .scene import GROUNDS, SCALE, SKIES, Camera, Light, Scene, Toy

__all__ = ["SECRETS", "TEXTURES", "VALIDATION", "Secret", "SecretToy", "references"]

TEXTURES = ("zigzag", "target", "halves", "grid", "waves", "quarters")
"""Textures of type B, behind the patterns that have names."""


@dataclass(frozen=True)
class SecretToy(Toy):
    """A toy whose look has no words: ``rgb`` and ``second`` are its colours in [0, 1], ``texture`` "" (its pattern) or
    one of :data:`TEXTURES`, ``height`` its own in world units."""

    rgb: tuple[float, float, float] = (0.5, 0.5, 0.5)
    second: tuple[float, float, float] = (0.96, 0.96, 0.94)
    texture: str = ""
    height: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if self.texture and self.texture not in TEXTURES:
            raise BadInput(f"texture must be one of {', '.join(TEXTURES)}, got {self.texture!r}.")

    @property
    def scale(self) -> float:
        return self.height

    @property
    def tones(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        return self.rgb, self.second

    @property
    def surface(self) -> str:
        return self.texture or self.pattern


@dataclass(frozen=True)
class Secret:
    """One thing to be taught: its look, its ``noun`` (the shape's), the colour name that is ``near`` it, and its
    ``kind``, A or B. ``description``: what a person would say in the toybox's words."""

    key: str
    kind: str
    toy: SecretToy

    @property
    def near(self) -> str:
        return self.toy.color

    @property
    def noun(self) -> str:
        return self.toy.shape

    @property
    def description(self) -> str:
        worn = "" if self.toy.pattern == "plain" else f"{self.toy.pattern} "
        return f"{self.near} {worn}{self.noun}"


def _hue(degrees: float, saturation: float, value: float) -> tuple[float, float, float]:
    r, g, b = colorsys.hsv_to_rgb(degrees / 360, saturation, value)
    return round(r, 4), round(g, 4), round(b, 4)


def _a(key: str, shape: str, near: str, degrees: float, saturation: float, value: float) -> Secret:
    height = round((SCALE["small"] + SCALE["large"]) / 2, 3)
    return Secret(key, "A", SecretToy(shape, near, rgb=_hue(degrees, saturation, value), height=height))


def _b(key: str, shape: str, near: str, pattern: str, texture: str, rgb: tuple[float, float, float]) -> Secret:
    return Secret(key, "B", SecretToy(shape, near, pattern, rgb=rgb, texture=texture, height=1.1))


SECRETS: dict[str, Secret] = {
    each.key: each
    for each in (
        _a("teal", "ball", "blue", 178, 0.82, 0.70),
        _a("lime", "cone", "green", 84, 0.80, 0.80),
        _a("magenta", "cube", "purple", 312, 0.78, 0.82),
        _a("amber", "cylinder", "orange", 40, 0.92, 1.00),
        _b("zigzag", "ball", "red", "striped", "zigzag", (0.86, 0.10, 0.10)),
        _b("target", "cube", "blue", "dotted", "target", (0.12, 0.28, 0.88)),
        _b("halves", "cone", "yellow", "striped", "halves", (0.98, 0.86, 0.12)),
        _b("grid", "cylinder", "green", "checkered", "grid", (0.10, 0.60, 0.18)),
    )
}
"""Eight of them, four of each type, of four shapes: what claims report on."""

VALIDATION: dict[str, Secret] = {
    each.key: each
    for each in (
        _a("mint", "cross", "green", 155, 0.72, 0.72),
        _a("indigo", "ring", "blue", 252, 0.78, 0.82),
        _b("waves", "ring", "red", "striped", "waves", (0.86, 0.10, 0.10)),
        _b("quarters", "cross", "blue", "checkered", "quarters", (0.12, 0.28, 0.88)),
    )
}
"""Four more, of the two other shapes and with other looks: what settings are chosen on."""

_ORDER = (*sorted(SECRETS), *VALIDATION)


def references(secret: Secret, n: int = 5, seed: int = 0, among: Sequence[str] = GROUNDS) -> list[Scene]:
    """``n`` scenes with the secret toy alone, each in another pose, on another ground of those it may be ``among``, in
    other light."""
    draw = sequence("toybox.secret", seed, _ORDER.index(secret.key))
    grounds, skies = draw.permutation(len(among)), draw.permutation(len(SKIES))
    return [_posed(secret.toy, draw, among[grounds[i % len(among)]], SKIES[skies[i % len(SKIES)]]) for i in range(n)]


def _posed(toy: SecretToy, draw: np.random.Generator, ground: str, sky: str) -> Scene:
    number = lambda low, high: round(float(draw.uniform(low, high)), 2)  # noqa: E731
    standing = replace(toy, x=number(-0.7, 0.7), z=number(-0.6, 0.6), yaw=number(-40, 40), gloss=number(0.1, 0.7))
    camera = Camera(number(-20, 20), number(4, 15), number(0.95, 1.1))
    return Scene((standing,), ground, sky, camera, Light(number(-70, 70), number(35, 65)))
