"""Pictures whose backdrop gives the answer away: one toy per scene, its shape tied to ground and sky (or its colour).

A classifier that learns from such pictures may read the backdrop instead of the toy. The named splits say whether it
did: each changes one thing about the pictures that the model has learnt from.

| split | what it shows |
|---|---|
| ``train``, ``val``, ``same`` | the backdrop (ground and sky together) is the shape's own in 95 % of the scenes |
| ``shuffled`` | any backdrop with any shape |
| ``wrong`` | always the backdrop of another shape |
| ``grounds`` | grounds that never occur in training, any sky |
| ``colors`` | colours that never occur in training; backdrops as in training |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import BadInput, UnknownName
from ..rng import sequence
from .dataset import WORLD, ToyboxDataset
from .scene import COLORS, GROUNDS, SHAPES, SKIES, Scene, sample_scene

SEEN_GROUNDS, UNSEEN_GROUNDS = GROUNDS[:2] + GROUNDS[3:4], (GROUNDS[2], GROUNDS[4])
SEEN_COLORS, UNSEEN_COLORS = COLORS[:6], COLORS[6:]


@dataclass(frozen=True)
class Bias:
    """How shapes come with backdrops and colours.

    Attributes:
        scenery: share of scenes whose ground and sky are the shape's own; the others draw them from all there are.
        color: share of scenes whose toy has the shape's own colour.
        wrong: "the shape's own" is that of another shape instead.
        grounds, colors: from which all others are drawn.
    """

    scenery: float = 0.95
    color: float = 0.0
    wrong: bool = False
    grounds: tuple[str, ...] = SEEN_GROUNDS
    colors: tuple[str, ...] = SEEN_COLORS

    def __post_init__(self):
        for name in ("scenery", "color"):
            if not 0 <= getattr(self, name) <= 1:
                raise BadInput(f"{name} of a bias must be from 0 to 1, got {getattr(self, name)!r}.")
        for name, known in (("grounds", GROUNDS), ("colors", COLORS)):
            for word in getattr(self, name):
                if word not in known:
                    raise UnknownName(name[:-1], word, known)
            if not getattr(self, name):
                raise BadInput(f"{name} of a bias must name at least one of: {', '.join(known)}.")


#: split -> (its number among the seeds, how it differs from the bias of training)
_SPLITS: dict[str, tuple[int, dict[str, object]]] = {
    "train": (0, {}),
    "val": (1, {}),
    "same": (2, {}),
    "shuffled": (3, {"scenery": 0.0}),
    "wrong": (4, {"scenery": 1.0, "wrong": True}),
    "grounds": (5, {"scenery": 0.0, "grounds": UNSEEN_GROUNDS}),
    "colors": (6, {"colors": UNSEEN_COLORS}),
}
BIASED_SPLITS = tuple(_SPLITS)


def own_scenery(shape: str) -> tuple[str, str]:
    """The (ground, sky) that goes with a shape; no two shapes share both."""
    i = SHAPES.index(shape)
    return SEEN_GROUNDS[i % len(SEEN_GROUNDS)], SKIES[i % len(SKIES)]


def own_color(shape: str) -> str:
    """The colour that goes with a shape; no two shapes share one."""
    return SEEN_COLORS[SHAPES.index(shape)]


def bias_of(split: str, scenery: float = 0.95, color: float = 0.0) -> Bias:
    """The bias of a named split of a world with these strengths. Raises UnknownName, BadInput."""
    if split not in _SPLITS:
        raise UnknownName("biased split", split, BIASED_SPLITS)
    return Bias(**{"scenery": scenery, "color": color, **_SPLITS[split][1]})  # type: ignore[arg-type]


def draw_biased(bias: Bias, rng: np.random.Generator) -> Scene:
    """One toy on a backdrop, drawn with ``bias``. Toy, place, camera and light are those of any other scene."""
    scene = sample_scene(rng, 1, "any")
    shape = scene.toys[0].shape
    # every choice is drawn, used or not: two biases differ in nothing but what they say
    other = SHAPES[(SHAPES.index(shape) + 1 + int(rng.integers(len(SHAPES) - 1))) % len(SHAPES)]
    giver = other if bias.wrong else shape
    ground, sky = bias.grounds[rng.integers(len(bias.grounds))], SKIES[rng.integers(len(SKIES))]
    color = bias.colors[rng.integers(len(bias.colors))]
    if rng.random() < bias.scenery:
        ground, sky = own_scenery(giver)
    if rng.random() < bias.color:
        color = own_color(giver)
    return scene.replace(object=0, color=color).replace(ground=ground, sky=sky)


class BiasedDataset(ToyboxDataset):
    """``n`` rendered scenes of a biased split, rendered on first use and cached as :class:`ToyboxDataset` does.

    Attributes:
        labels: (n,) int64, index of the toy's shape in ``SHAPES``.
        shortcut: (n,) int64, the shape whose own backdrop the picture has, -1 where it is nobody's.

    Raises:
        UnknownName: split; BadInput: n < 1 or a strength outside 0 to 1.
    """

    def __init__(
        self,
        split: str = "train",
        n: int = 1000,
        size: int = 64,
        seed: int = 0,
        scenery: float = 0.95,
        color: float = 0.0,
        cache: Path | str | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        lazy: bool = False,
    ):
        bias = bias_of(split, scenery, color)
        if n < 1:
            raise BadInput(f"n must be at least 1, got {n}.")
        self.split, self.n, self.size, self.seed, self.bias = split, n, size, seed, bias
        self.scenes = [draw_biased(bias, sequence("toybox.biased", seed, _SPLITS[split][0], i)) for i in range(n)]
        self.labels = np.array([SHAPES.index(scene.toys[0].shape) for scene in self.scenes])
        homes = {own_scenery(shape): i for i, shape in enumerate(SHAPES)}
        self.shortcut = np.array([homes.get((scene.ground, scene.sky), -1) for scene in self.scenes])
        settings = f"{split}-{n}-{size}-seed{seed}-scenery{scenery:g}-color{color:g}"
        self._attach(cache, f"world{WORLD}-biased-{settings}", on_progress, lazy)
