"""Data sets of one world that differ in their rules: what a set adds, drops or skews is known exactly.

=========  =============================================================================================
set        its rule
=========  =============================================================================================
neutral    toys seen from near, every concept drawn apart (:func:`sfumato.toybox.cues.cue_scenes`)
biased     no cones; a cube is red in 90 % of its pictures; night skies are a fifth as frequent
degraded   neutral scenes, badly stored
a style    neutral scenes in a style (:mod:`sfumato.toybox.styles`): watercolour, sketch, pixel, mosaic
=========  =============================================================================================

The same scene can be shown in every set's style; :func:`joint_distribution` gives the frequencies of a set's rule.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ..errors import UnknownName
from ..rng import sequence
from . import rendering
from .cues import CUE_SHAPES, cue_scene, cue_scenes
from .dataset import WORLD, ToyboxDataset
from .scene import COLORS, SKIES, Scene
from .styles import STYLES, styled

__all__ = ["SETS", "SetDataset", "joint_distribution", "set_scenes"]

SETS = ("neutral", "biased", *[style for style in STYLES if style != "plain"])
RED, RARE = 0.9, 0.2
_SPLITS = ("train", "val", "test")


def joint_distribution(name: str) -> dict[tuple[str, str], float]:
    """How often a set shows each (shape, colour); the frequencies sum to 1. Raises UnknownName."""
    _check(name)
    shapes = [shape for shape in CUE_SHAPES if name != "biased" or shape != "cone"]
    found = {}
    for shape in shapes:
        for color in COLORS:
            share = 1 / len(COLORS)
            if name == "biased" and shape == "cube":
                share = RED if color == "red" else (1 - RED) / (len(COLORS) - 1)
            found[shape, color] = share / len(shapes)
    return found


def set_scenes(name: str, n: int, seed: int = 0, split: str = "train") -> list[Scene]:
    """``n`` scenes of a set; those of all but "biased" are the neutral ones. Scene i is a pure function of the other
    arguments and i. Raises UnknownName, BadInput."""
    _check(name)
    if name != "biased":
        return cue_scenes(n, seed, 1.0, 0.25, split)[0]
    cue_scenes(min(n, 1) or n, seed, 1.0, 0.25, split)  # refuses what it refuses
    found = []
    for i in range(n):
        rng = sequence("toybox.sets.biased", seed, _SPLITS.index(split), i)
        scene = cue_scene(rng, str(rng.choice([shape for shape in CUE_SHAPES if shape != "cone"])))
        if scene.sky == "night" and rng.random() >= RARE:
            scene = scene.replace(sky=str(rng.choice([sky for sky in SKIES if sky != "night"])))
        if scene.toys[0].shape == "cube":
            rest = [color for color in COLORS if color != "red"]
            scene = scene.replace(0, color="red" if rng.random() < RED else str(rng.choice(rest)))
        found.append(scene)
    return found


def _check(name: str) -> None:
    if name not in SETS:
        raise UnknownName("set of the toybox", name, SETS)


class SetDataset(ToyboxDataset):
    """Rendered scenes of a set, in its style, cached as :class:`ToyboxDataset` is.

    Attributes:
        images (n, size, size, 3) uint8, masks (n, size, size) int8 (-1 background, 0 the toy), scenes.
    """

    def __init__(
        self,
        name: str,
        n: int = 1000,
        size: int = 64,
        seed: int = 0,
        split: str = "train",
        cache: Path | str | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        lazy: bool = False,
    ):
        self.split, self.n, self.size, self.seed = split, n, size, seed
        self.scenes = set_scenes(name, n, seed, split)
        self.style = name if name in STYLES else "plain"
        self._attach(cache, f"set{WORLD}-{name}-{split}-{n}-{size}-seed{seed}", on_progress, lazy)

    def _render(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        frames = rendering.render([self.scenes[i] for i in rows.tolist()], self.size)
        images = rendering.to_uint8(styled(torch.as_tensor(frames.image), self.style))
        return {"images": images.permute(0, 2, 3, 1).numpy(), "masks": frames.mask.numpy()}
