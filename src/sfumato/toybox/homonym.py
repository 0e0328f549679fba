"""A homonym: one word that captions use for two shapes, for the one more often than for the other.

A model that has read such captions draws mostly the commoner sense when it is asked for the word, and nothing that one
could write makes it draw the rarer one reliably. What a picture was meant to show is known.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import BadInput
from ..rng import sequence
from .captions import caption
from .scene import SHAPES, Scene, sample_scene

__all__ = ["HOMONYMS", "Homonym", "HomonymCaption"]


@dataclass(frozen=True)
class HomonymCaption:
    """A scene, what is said of it, and the shape that the homonym stands for there."""

    scene: Scene
    caption: str
    sense: str


@dataclass(frozen=True)
class Homonym:
    """``senses``: shape -> its share of the captions. Raises BadInput for other shapes, shares that do not add up to 1,
    and a word that is a shape itself."""

    word: str
    senses: tuple[tuple[str, float], ...]

    def __post_init__(self) -> None:
        if self.word in SHAPES or not set(dict(self.senses)) <= set(SHAPES):
            raise BadInput(f"a homonym is a new word for some of {', '.join(SHAPES)}, got {self.word!r} for "
                           f"{', '.join(dict(self.senses)) or 'none'}.")  # fmt: skip
        if abs(sum(share for _, share in self.senses) - 1) > 1e-6 or any(share <= 0 for _, share in self.senses):
            raise BadInput(f"shares of the senses of {self.word!r} must be above 0 and add up to 1.")

    @property
    def rare(self) -> str:
        """The sense with the smallest share."""
        return min(self.senses, key=lambda each: each[1])[0]

    def sample(self, seed: int, index: int) -> HomonymCaption:
        """Scene ``index`` of a seed with one toy of either sense, none of a held-out combination, and its caption with
        the word in the place of the shape: a pure function of its arguments."""
        draw = sequence(f"toybox.homonym.{self.word}", seed, index)
        shapes = [shape for shape, _ in self.senses]
        sense = shapes[int(draw.choice(len(shapes), p=[share for _, share in self.senses]))]
        while (scene := sample_scene(draw, 1)).toys[0].shape != sense:
            pass
        return HomonymCaption(scene, caption(scene, draw, "random").text.replace(sense, self.word), sense)


HOMONYMS = {
    each.word: each
    for each in (
        Homonym("jack", (("cone", 0.75), ("cylinder", 0.25))),
        Homonym("pel", (("ball", 0.75), ("ring", 0.25))),
        Homonym("dax", (("cube", 0.75), ("cross", 0.25))),
    )
}
"""Three of them, over the six shapes."""
