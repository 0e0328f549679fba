"""Looks that vary without steps, under names that do not: every hue between two colours has the nearer one's name.

The toybox's own scenes have eight colours and two sizes. A model that has seen nothing else has never seen a hue
between two names, however few words there are for it; one that has seen these scenes has.
"""

from __future__ import annotations

import colorsys

import numpy as np

from .rendering import COLOR_RGB, SECOND_RGB
from .scene import SCALE, SIZES, Scene, Toy
from .secret import SecretToy

__all__ = ["continuous"]

HEIGHTS = (0.72, 1.35)  # of toys, in world units


def _wheel() -> list[tuple[float, str]]:
    """(hue in degrees, name) of the colours that have a hue, in order."""
    found = {name: colorsys.rgb_to_hsv(*rgb) for name, rgb in COLOR_RGB.items()}
    return sorted((360 * hue, name) for name, (hue, saturation, _) in found.items() if saturation > 0.3)


def continuous(scene: Scene, draw: np.random.Generator) -> Scene:
    """The scene with every toy in a hue and at a height of its own, drawn evenly among those that its names stand for;
    white and black toys keep their colour. Captions say the same of it as before."""
    return Scene(tuple(_varied(toy, draw) for toy in scene.toys), scene.ground, scene.sky, scene.camera, scene.light)


def _varied(toy: Toy, draw: np.random.Generator) -> SecretToy:
    middle = (SCALE["small"] + SCALE["large"]) / 2
    low, high = (HEIGHTS[0], middle) if toy.size == SIZES[0] else (middle, HEIGHTS[1])
    height = round(float(draw.uniform(low, high)), 3)
    second = SECOND_RGB.get(toy.color, (0.96, 0.96, 0.94))
    return SecretToy(
        toy.shape, toy.color, toy.pattern, toy.size, toy.x, toy.z, toy.yaw, toy.gloss, rgb=_tone(toy.color, draw),
        second=second, height=height,
    )  # fmt: skip


def _tone(color: str, draw: np.random.Generator) -> tuple[float, float, float]:
    """A colour on the wheel up to halfway to the neighbours; saturation and value go over into theirs, or these would
    tell where a name ends."""
    wheel = _wheel()
    at = next((i for i, (_, name) in enumerate(wheel) if name == color), None)
    if at is None:
        return COLOR_RGB[color]
    here, (before, left), (after, right) = wheel[at][0], wheel[at - 1], wheel[(at + 1) % len(wheel)]
    before -= 360 * (before > here)
    after += 360 * (after < here)
    hue = float(draw.uniform((before + here) / 2, (here + after) / 2))
    other, share = (right, (hue - here) / (after - here)) if hue > here else (left, (here - hue) / (here - before))
    (_, *own), (_, *its) = (colorsys.rgb_to_hsv(*COLOR_RGB[name]) for name in (color, other))
    saturation, value = ((1 - share) * a + share * b for a, b in zip(own, its, strict=True))
    r, g, b = colorsys.hsv_to_rgb(hue % 360 / 360, saturation, value)
    return round(r, 4), round(g, 4), round(b, 4)
