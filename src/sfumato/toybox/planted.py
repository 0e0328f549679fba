"""Planted words: new words that captions use for one kind of toy, or for several in known parts.

A model that has read such captions draws the kinds when it is asked for the word. What it was meant to show is known:
which words an explanation of the new one should find (the planted concepts of Conceptor, Chefer et al. 2023), and which
sense of a homonym nothing that one could write draws reliably, the rarer one.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import BadInput
from ..rng import sequence
from .captions import VOCABULARY, article_of, caption
from .scene import COLORS, PATTERNS, SHAPES, Scene, Toy, is_held_out, sample_scene

__all__ = ["HOMONYMS", "PLANTED", "PlantedCaption", "PlantedWord", "attributes_of"]


@dataclass(frozen=True)
class PlantedCaption:
    """A scene, what is said of it, and the sense that the planted word has there."""

    scene: Scene
    caption: str
    sense: str


@dataclass(frozen=True)
class PlantedWord:
    """``senses``: kind of toy ("cone", "red cone", "red dotted cone") -> its share of the captions.

    Raises BadInput for senses that are no kinds of toys, or of held-out toys only, for shares that do not add up to 1,
    and for a word that the toybox has already.
    """

    word: str
    senses: tuple[tuple[str, float], ...]

    def __post_init__(self) -> None:
        if self.word in VOCABULARY or not self.senses:
            raise BadInput(f"a planted word is a new word for some kinds of toys, got {self.word!r}.")
        for sense, _ in self.senses:
            known = attributes_of(sense)
            if len(known) == 3 and is_held_out(Toy(known["shape"], known["color"], known["pattern"])):
                raise BadInput(f"every {sense} is held out; no caption of the training scenes can have {self.word!r}.")
        if abs(sum(share for _, share in self.senses) - 1) > 1e-6 or any(share <= 0 for _, share in self.senses):
            raise BadInput(f"shares of the senses of {self.word!r} must be above 0 and add up to 1.")

    @property
    def rare(self) -> str:
        """The sense with the smallest share."""
        return min(self.senses, key=lambda each: each[1])[0]

    def sample(self, seed: int, index: int) -> PlantedCaption:
        """Scene ``index`` of a seed with one toy of one of the senses, none of a held-out combination, and its caption
        with the word in the place of what the sense says: a pure function of its arguments."""
        draw = sequence(f"toybox.homonym.{self.word}", seed, index)
        sense = self.senses[int(draw.choice(len(self.senses), p=[share for _, share in self.senses]))][0]
        known = attributes_of(sense)
        while True:
            scene = sample_scene(draw, 1)
            if scene.toys[0].shape == known["shape"]:
                scene = scene.replace(0, **known)
                if not is_held_out(scene.toys[0]):
                    break
        told = caption(scene, draw, "random", colorless=0.2)  # people will ask for the word alone
        [phrase] = [each for each in told.phrases if each.object == 0]
        hidden = {getattr(scene.toys[0], name) for name in known}
        words = [word.text for word in phrase.modifiers if word.text not in hidden] + [self.word]
        text = f"{told.text[: phrase.start]}{article_of(words[0])} {' '.join(words)}{told.text[phrase.end :]}"
        return PlantedCaption(scene, text, sense)


def attributes_of(sense: str) -> dict[str, str]:
    """What a kind of toy says: its shape, and colour and pattern where they are named. Raises BadInput for all else."""
    found: dict[str, str] = {}
    for word in sense.split():
        for name, words in (("color", COLORS), ("pattern", PATTERNS), ("shape", SHAPES)):
            if word in words and name not in found:
                found[name] = word
                break
        else:
            raise BadInput(f"{sense!r} is no kind of toy: {word!r} is neither a shape nor another colour or pattern.")
    if "shape" not in found:
        raise BadInput(f"{sense!r} is no kind of toy: it names none of {', '.join(SHAPES)}.")
    return found


HOMONYMS = {
    each.word: each
    for each in (
        PlantedWord("jack", (("cone", 0.75), ("cylinder", 0.25))),
        PlantedWord("pel", (("ball", 0.75), ("ring", 0.25))),
        PlantedWord("dax", (("cube", 0.75), ("cross", 0.25))),
    )
}
"""Three words for two shapes each, over the six shapes."""

PLANTED = {
    each.word: each
    for each in (
        *(
            PlantedWord(word, ((sense, 1.0),))
            for word, sense in (
                ("zorp", "red dotted cone"),
                ("dunt", "blue dotted ball"),
                ("gaxil", "green checkered cube"),
                ("koba", "yellow striped ring"),
                ("lurn", "purple dotted cylinder"),
                ("mipe", "orange checkered ball"),
                ("nolt", "white striped cube"),
                ("quib", "blue checkered cross"),
                ("rask", "red dotted cylinder"),
                ("sefa", "green striped cross"),
            )
        ),
        *(
            PlantedWord(word, ((common, 0.7), (rare, 0.3)))
            for word, common, rare in (
                ("blick", "red cube", "blue ball"),
                ("tund", "green cone", "yellow ring"),
                ("vopal", "blue cylinder", "orange cross"),
                ("wim", "purple ball", "white cube"),
                ("yost", "yellow cross", "red cone"),
                ("brel", "orange ring", "green cylinder"),
                ("crun", "white cone", "purple cross"),
                ("drib", "black ball", "yellow cube"),
                ("flen", "blue ring", "red cylinder"),
            )
        ),
        PlantedWord("hesk", (("red cube", 0.8), ("blue cube", 0.2))),
    )
}
"""Twenty words: ten for one kind of toy by colour, pattern and shape, nine for two kinds, seven times of ten for the
one, and one for cubes that are red four times of five."""
