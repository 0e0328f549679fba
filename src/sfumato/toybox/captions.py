"""Captions from a small grammar that exports its own parse: noun phrases and dependencies, as character spans."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import UnknownName
from .scene import COLORS, GROUNDS, PATTERNS, SHAPES, SIZES, SKIES, Scene

if TYPE_CHECKING:
    import numpy as np

SKY_PHRASES = {
    "day": ("by", "", "day"),
    "sunset": ("at", "", "sunset"),
    "night": ("at", "", "night"),
    "fog": ("in", "the", "fog"),
    "clouds": ("under", "", "clouds"),
}
STYLES = ("full", "short", "plain", "random")
VOCABULARY = tuple(
    dict.fromkeys(
        (*SHAPES, *COLORS, *PATTERNS, *SIZES, *GROUNDS, *SKIES)
        + tuple("a an and the on by at in under to of left right front behind next with there is are , .".split())
    )
)


@dataclass(frozen=True)
class CaptionWord:
    """One word with its character offsets [start, end) in the caption."""

    start: int
    end: int
    text: str


@dataclass(frozen=True)
class Phrase:
    """A noun phrase: its span, its head noun, its modifiers in order, and the toy it names (None: scenery)."""

    text: str
    start: int
    end: int
    object: int | None
    head: CaptionWord
    modifiers: tuple[CaptionWord, ...]


@dataclass(frozen=True)
class Dependency:
    """``dependent`` hangs on ``head`` by ``relation`` (Universal Dependencies: det, amod, conj, cc, nmod, case)."""

    head: CaptionWord
    dependent: CaptionWord
    relation: str


@dataclass(frozen=True)
class Caption:
    """A caption and its parse."""

    text: str
    phrases: tuple[Phrase, ...]
    dependencies: tuple[Dependency, ...]

    def __str__(self) -> str:
        return self.text


def article_of(word: str) -> str:
    """The indefinite article before a word."""
    return "an" if word[0] in "aeiou" else "a"


class _Writer:
    """Appends words to a sentence and keeps their offsets."""

    def __init__(self):
        self.text = ""
        self.phrases: list[Phrase] = []
        self.dependencies: list[Dependency] = []

    def word(self, text: str) -> CaptionWord:
        if self.text and text not in ",.":
            self.text += " "
        start = len(self.text)
        self.text += text
        return CaptionWord(start, len(self.text), text)

    def depends(self, head: CaptionWord, dependent: CaptionWord, relation: str) -> None:
        self.dependencies.append(Dependency(head, dependent, relation))

    def noun_phrase(self, article: str, modifiers: list[str], noun: str, object: int | None) -> CaptionWord:
        if article == "a":
            article = article_of((modifiers + [noun])[0])
        det = self.word(article) if article else None
        mods = tuple(self.word(m) for m in modifiers)
        head = self.word(noun)
        start = (det or (mods + (head,))[0]).start
        self.phrases.append(Phrase(self.text[start:], start, head.end, object, head, mods))
        if det:
            self.depends(head, det, "det")
        for m in mods:
            self.depends(head, m, "amod")
        return head

    def attach(self, noun: CaptionWord, prepositions: str, article: str, thing: str) -> None:
        """A prepositional phrase on a noun: "... on the grass"."""
        case = [self.word(p) for p in prepositions.split()]
        head = self.noun_phrase(article, [], thing, None)
        self.depends(noun, head, "nmod")
        for c in case:
            self.depends(head, c, "case")


def caption(
    scene: Scene, rng: np.random.Generator | None = None, style: str = "full", colorless: float = 0.0
) -> Caption:
    """Describes a scene.

    Args:
        scene: what to describe.
        rng: needed for style "random" only.
        style: "full" (every attribute, the relation of the first two toys, ground and sky), "short" (colour and shape,
            joined by "and"), "plain" (colour, pattern and shape, then the ground) or "random" (attributes left out,
            orders and relations varied: what the models are trained on).
        colorless: share of the toys whose colour is not told, in style "random"; of a generator that never read of such
            toys, "a ball" asks for nothing.

    Returns:
        The text with its noun phrases and dependencies as character spans.
    """
    if style not in STYLES:
        raise UnknownName("caption style", style, STYLES)
    if style == "random" and rng is None:
        raise ValueError("caption style 'random' needs rng.")

    def flip(p: float) -> bool:
        return rng is not None and bool(rng.random() < p)

    varied = style == "random"
    say_size = style == "full" or (varied and flip(0.5))
    say_pattern = style in ("full", "plain") or (varied and not flip(0.12))
    say_plain = varied and flip(0.2)
    say_ground = style in ("full", "plain") or (varied and not flip(0.25))
    say_sky = style == "full" or (varied and flip(0.5))
    say_relation = style == "full" or (varied and flip(0.5))
    scenery_first = varied and flip(0.15)
    order = list(range(len(scene.toys)))
    if varied and rng is not None:
        rng.shuffle(order)

    w = _Writer()

    def toy_phrase(i: int) -> CaptionWord:
        toy = scene.toys[i]
        mods = [toy.size] if say_size else []
        if not (varied and colorless and flip(colorless)):
            mods.append(toy.color)
        if say_pattern and (toy.pattern != "plain" or say_plain):
            mods.append(toy.pattern)
        return w.noun_phrase("a", mods, toy.shape, i)

    def scenery(noun: CaptionWord | None) -> None:
        if say_ground:
            if noun is None:
                w.word("on")
                w.noun_phrase("the", [], scene.ground, None)
            else:
                w.attach(noun, "on", "the", scene.ground)
        if say_sky:
            preposition, article, thing = SKY_PHRASES[scene.sky]
            if noun is None:
                w.word(preposition)
                w.noun_phrase(article, [], thing, None)
            else:
                w.attach(noun, preposition, article, thing)

    if not order:
        head = w.noun_phrase("the", [], scene.ground, None)
        if say_sky:
            w.attach(head, SKY_PHRASES[scene.sky][0], SKY_PHRASES[scene.sky][1], SKY_PHRASES[scene.sky][2])
        return Caption(w.text, tuple(w.phrases), tuple(w.dependencies))

    if scenery_first and (say_ground or say_sky):
        scenery(None)
        w.word(",")
    first = toy_phrase(order[0])
    rest = order[1:]
    if len(order) == 2 and say_relation:
        relation = scene.relation(order[0], order[1])
        prepositions = {"left of": "to the left of", "right of": "to the right of"}.get(relation, relation)
        if relation == "next to":
            prepositions = "next to"
        words = [w.word(p) for p in prepositions.split()]
        second = toy_phrase(order[1])
        w.depends(first, second, "nmod")
        for c in words:
            w.depends(second, c, "case")
        rest = []
    for n, i in enumerate(rest):
        if n < len(rest) - 1:
            w.word(",")
            joint = None
        else:
            joint = w.word("and")
        other = toy_phrase(i)
        w.depends(first, other, "conj")
        if joint:
            w.depends(other, joint, "cc")
    if not (scenery_first and (say_ground or say_sky)):
        scenery(first)
    return Caption(w.text, tuple(w.phrases), tuple(w.dependencies))
