"""Shape against texture: toys whose shape says one thing and whose texture another, and pairs that share one factor.

The four *cues* pair a shape with a texture (``CUES``: a ball is plain, a cube striped, ...), so that a label may be
read from either. In a *conflict* the two name different labels. Colour, pose, place, camera, light and scenery are
drawn apart from
both: a factor of their own, not a part of shape or texture.

A *factor pair* is two scenes that agree in one factor and are independent in all others; the members of a pair for
"shape" may therefore differ in pose and place too, unlike two restylings of one picture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import BadInput, UnknownName
from ..rng import sequence
from .dataset import WORLD, ToyboxDataset
from .scene import COLORS, GROUNDS, SKIES, Camera, Light, Scene, Toy

if TYPE_CHECKING:
    from numpy.random import Generator

CUES = (("ball", "plain"), ("cube", "striped"), ("cone", "dotted"), ("ring", "checkered"))
CUE_SHAPES = tuple(shape for shape, _ in CUES)
CUE_TEXTURES = tuple(texture for _, texture in CUES)
FACTORS = ("shape", "texture", "color", "pose", "scenery")
MOST = 2**31  # scenes of a seed


def cue_scene(rng: Generator, shape: str | None = None, texture: str | None = None) -> Scene:
    """One large toy seen from near, everything but what is given drawn independently and evenly."""
    toy = Toy(
        shape=shape or str(rng.choice(CUE_SHAPES)),
        pattern=texture or str(rng.choice(CUE_TEXTURES)),
        color=str(rng.choice(COLORS)),
        x=round(float(rng.uniform(-0.3, 0.3)), 3),
        z=round(float(rng.uniform(-0.4, 0.4)), 3),
        yaw=round(float(rng.uniform(-40, 40)), 1),
        gloss=round(float(rng.uniform(0, 1)), 2),
    )
    camera = Camera(
        azimuth=round(float(rng.uniform(-25, 25)), 1),
        elevation=round(float(rng.uniform(4, 15)), 1),
        zoom=round(float(rng.uniform(1.3, 1.7)), 3),
    )
    light = Light(round(float(rng.uniform(-75, 75)), 1), round(float(rng.uniform(35, 65)), 1))
    return Scene((toy,), str(rng.choice(GROUNDS)), str(rng.choice(SKIES)), camera, light)


def agreeing(scene: Scene, other: Scene, factor: str) -> Scene:
    """``scene`` with one factor taken over from ``other``; both have one toy.

    "pose" is where the toy stands, how it is turned, and the camera; "scenery" is ground, sky and light.

    Raises:
        UnknownName: no such factor.
    """
    toy, model = scene.toys[0], other.toys[0]
    match factor:
        case "shape":
            return scene.replace(0, shape=model.shape)
        case "texture":
            return scene.replace(0, pattern=model.pattern)
        case "color":
            return scene.replace(0, color=model.color)
        case "pose":
            return replace(scene, toys=(replace(toy, x=model.x, z=model.z, yaw=model.yaw),), camera=other.camera)
        case "scenery":
            return replace(scene, ground=other.ground, sky=other.sky, light=other.light)
    raise UnknownName("factor", factor, FACTORS)


PLACES = ("left", "middle", "right")
CONCEPTS = ("shape", "texture", "color", "place", "scenery", "ground", "sky")


def concept_of(scene: Scene, concept: str) -> str:
    """What a scene of one toy is in a concept, as a word: "place" is the third of where such toys stand in the
    picture, "scenery" ground and sky together. Raises UnknownName."""
    toy = scene.toys[0]
    match concept:
        case "shape" | "color":
            return str(getattr(toy, concept))
        case "texture":
            return toy.pattern
        case "place":
            at = scene.picture_x(toy)
            return PLACES[int(at > -0.08) + int(at > 0.08)]
        case "scenery":
            return f"{scene.ground}, {scene.sky}"
        case "ground" | "sky":
            return str(getattr(scene, concept))
    raise UnknownName("concept", concept, CONCEPTS)


def factor_pairs(factor: str, n: int, seed: int = 0) -> list[tuple[Scene, Scene]]:
    """``n`` pairs of scenes that agree in ``factor`` and are independent in all others.

    Pair i is a pure function of (factor, seed, i). Raises UnknownName, BadInput for n < 1.
    """
    if factor not in FACTORS:
        raise UnknownName("factor", factor, FACTORS)
    _positive("n", n)
    pairs = []
    for i in range(n):
        generator = sequence("toybox.pair", seed, FACTORS.index(factor), i)
        first = cue_scene(generator)
        pairs.append((first, agreeing(cue_scene(generator), first, factor)))
    return pairs


def cue_scenes(
    n: int, seed: int = 0, shape: float = 1.0, texture: float = 0.25, split: str = "train"
) -> tuple[list[Scene], np.ndarray]:
    """``n`` scenes and their labels (n,) in 0..3: the shape is the label's with probability ``shape``, the texture with
    probability ``texture``, and otherwise one of the three others, drawn evenly. 0.25 is no relation at all.

    Scene i is a pure function of the other arguments and i. Raises BadInput, UnknownName.
    """
    for name, value in (("shape", shape), ("texture", texture)):
        if not 0 <= value <= 1:
            raise BadInput(f"{name} must be a probability from 0 to 1, got {value}.")
    splits = ("train", "val", "test")
    if split not in splits:
        raise UnknownName("split", split, splits)
    _positive("n", n)
    scenes, labels = [], []
    for i in range(n):
        rng = sequence("toybox.cue", seed, splits.index(split), i)
        label = int(rng.integers(len(CUES)))
        own, other = _cue(rng, label, shape), _cue(rng, label, texture)
        scenes.append(cue_scene(rng, CUE_SHAPES[own], CUE_TEXTURES[other]))
        labels.append(label)
    return scenes, np.array(labels)


def conflicts(n: int, seed: int = 0, split: str = "test") -> tuple[list[Scene], np.ndarray, np.ndarray]:
    """``n`` scenes whose shape and texture always name different labels: (scenes, shape labels, texture labels).

    Scenes whose two cues agree say nothing about which of them decides, and are left out (Geirhos et al. 2019).
    """
    scenes, shapes = cue_scenes(n, seed, 1.0, 0.0, split)
    return scenes, shapes, np.array([CUE_TEXTURES.index(scene.toys[0].pattern) for scene in scenes])


def _cue(rng: Generator, label: int, share: float) -> int:
    agrees, step = rng.random() < share, int(rng.integers(1, len(CUES)))
    return label if agrees else (label + step) % len(CUES)


def _positive(name: str, value: int) -> None:
    if not 1 <= value < MOST:
        raise BadInput(f"{name} must be at least 1, got {value}.")


class CueDataset(ToyboxDataset):
    """Rendered :func:`cue_scenes`, cached as :class:`ToyboxDataset` is.

    Attributes:
        images (n, size, size, 3) uint8, masks (n, size, size) int8 (-1 background, 0 the toy), scenes; labels (n,).
    """

    def __init__(
        self,
        split: str = "train",
        n: int = 1000,
        size: int = 64,
        seed: int = 0,
        shape: float = 1.0,
        texture: float = 0.25,
        cache: Path | str | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        lazy: bool = False,
    ):
        self.split, self.n, self.size, self.seed = split, n, size, seed
        self.scenes, self.labels = cue_scenes(n, seed, shape, texture, split)
        self._attach(cache, f"cues{WORLD}-{split}-{n}-{size}-seed{seed}-{shape}-{texture}", on_progress, lazy)
