"""Questions about a scene and their exact answers: what colour, shape or pattern, how many, which side of the picture
or of another toy, is there.

Everything is read off the scene, nothing off pixels, so an answer is right by construction; a question is asked only
where it has one answer. Besides the answer a :class:`Question` holds its *evidence*: the toys that decide it and the
words that say which question it is. An explanation of an answering model can be scored against both.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from .. import valid
from ..errors import BadInput, UnknownName
from .captions import CaptionWord
from .scene import COLORS, PATTERNS, SHAPES, SIZES, Scene

if TYPE_CHECKING:
    import numpy as np

QUESTION_KINDS = ("color", "shape", "pattern", "count", "half", "side", "exists")
NUMBERS = ("zero", "one", "two", "three", "four")
#: all answers there are, in the order of a model's answer scores
ANSWERS = (*COLORS, *SHAPES, *PATTERNS, *NUMBERS, "left", "right", "yes", "no")
#: all words of all questions
QUESTION_WORDS = tuple(
    dict.fromkeys(
        (*SHAPES, *(f"{shape}s" for shape in SHAPES if shape != "cross"), "crosses", *COLORS, *PATTERNS, *SIZES)
        + tuple("what color shape pattern is the how many toys toy are there on which side of a an ?".split())
    )
)
#: toys closer than this across the picture (half widths) are on no side of each other, at half of it of the centre
CLEAR = 0.3


@dataclass(frozen=True)
class Question:
    """A question, its one right answer, and what the answer hangs on.

    kind: one of ``QUESTION_KINDS``; text: the question; answer: one of ``ANSWERS``.
    objects: indices of the toys that decide the answer (of a count or an absence: all toys that were to be looked at).
    words: the content words of the question, those that say what is asked and of which toy, with character offsets.
    """

    kind: str
    text: str
    answer: str
    objects: tuple[int, ...]
    words: tuple[CaptionWord, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Question:
        """Inverse of :meth:`to_json`. Raises BadInput on anything that is not a question."""
        try:
            raw = valid.loads(text)
            objects, words = tuple(raw.pop("objects")), tuple(CaptionWord(**word) for word in raw.pop("words"))
            return cls(objects=objects, words=words, **raw)
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise BadInput(f"this text is not a toybox question: {error}.") from None


def plural(shape: str) -> str:
    """ "cubes", "crosses"."""
    return shape + ("es" if shape.endswith("s") else "s")


def _question(kind: str, text: str, answer: str, objects: Sequence[int], content: Sequence[str]) -> Question:
    words, start = [], 0
    for word in content:  # in the order in which they stand in the text
        start = text.index(word, start)
        words.append(CaptionWord(start, start + len(word), word))
        start += len(word)
    return Question(kind, text, answer, tuple(objects), tuple(words))


def _names(scene: Scene, i: int) -> Iterator[str]:
    """Ways to name toy ``i`` that fit no other toy: "cube", "red toy", "red cube"."""
    toy, others = scene.toys[i], [other for k, other in enumerate(scene.toys) if k != i]
    if all(other.shape != toy.shape for other in others):
        yield toy.shape
    if all(other.color != toy.color for other in others):
        yield f"{toy.color} toy"
    if all((other.shape, other.color) != (toy.shape, toy.color) for other in others):
        yield f"{toy.color} {toy.shape}"


def _content(name: str) -> list[str]:
    return [word for word in name.split() if word != "toy"]


def _about(kind: str) -> Callable[[Scene], Iterator[Question]]:
    """Questions for one attribute of a toy that the question names without giving that attribute away."""

    def ask(scene: Scene) -> Iterator[Question]:
        for i, toy in enumerate(scene.toys):
            for name in _names(scene, i):
                if getattr(toy, kind) not in name.split():
                    yield _question(
                        kind, f"what {kind} is the {name} ?", getattr(toy, kind), [i], [kind, *_content(name)]
                    )

    return ask


def _counts(scene: Scene) -> Iterator[Question]:
    everyone = range(len(scene.toys))
    yield _question("count", "how many toys are there ?", NUMBERS[len(scene.toys)], everyone, ["many", "toys"])
    for shape in SHAPES:
        number = sum(toy.shape == shape for toy in scene.toys)
        text = f"how many {plural(shape)} are there ?"
        yield _question("count", text, NUMBERS[number], everyone, ["many", plural(shape)])
    for color in COLORS:
        number = sum(toy.color == color for toy in scene.toys)
        yield _question("count", f"how many {color} toys are there ?", NUMBERS[number], everyone, ["many", color])


def _halves(scene: Scene) -> Iterator[Question]:
    for i, toy in enumerate(scene.toys):
        across = scene.picture_x(toy)
        for name in _names(scene, i) if abs(across) >= CLEAR / 2 else ():
            text = f"on which side is the {name} ?"
            yield _question("half", text, "left" if across < 0 else "right", [i], ["side", *_content(name)])


def _sides(scene: Scene) -> Iterator[Question]:
    for i, first in enumerate(scene.toys):
        for j, second in enumerate(scene.toys):
            across = scene.picture_x(first) - scene.picture_x(second)
            if i == j or abs(across) < CLEAR:
                continue
            for name in _names(scene, i):
                for other in _names(scene, j):
                    text = f"on which side of the {other} is the {name} ?"
                    content = ["side", *_content(other), *_content(name)]
                    yield _question("side", text, "left" if across < 0 else "right", [i, j], content)


def _existence(scene: Scene) -> Iterator[Question]:
    for shape in SHAPES:
        for color in COLORS:
            fit = [i for i, toy in enumerate(scene.toys) if (toy.shape, toy.color) == (shape, color)]
            objects = fit or range(len(scene.toys))
            text = f"is there {'an' if color == 'orange' else 'a'} {color} {shape} ?"
            yield _question("exists", text, "yes" if fit else "no", objects, [color, shape])


_ASK: dict[str, Callable[[Scene], Iterator[Question]]] = {
    "color": _about("color"),
    "shape": _about("shape"),
    "pattern": _about("pattern"),
    "count": _counts,
    "half": _halves,
    "side": _sides,
    "exists": _existence,
}


def questions_about(scene: Scene, kinds: Sequence[str] = QUESTION_KINDS) -> list[Question]:
    """Every question of these ``kinds`` that can be asked of a scene, always in the same order.

    Raises UnknownName for a kind that does not exist.
    """
    for kind in kinds:
        if kind not in QUESTION_KINDS:
            raise UnknownName("kind of question", kind, QUESTION_KINDS)
    return [question for kind in kinds for question in _ASK[kind](scene)]


def sample_question(scene: Scene, rng: np.random.Generator, kinds: Sequence[str] = QUESTION_KINDS) -> Question:
    """One question: first its kind is drawn, then, of counts and existence, the answer, so that none is guessed easily.

    "How many" is as often asked of something there as of something not there, "is there" is answered yes as often as
    no. Kinds of which the scene allows no question are passed over; a kind that
    is given twice is drawn twice as often.

    Raises:
        UnknownName: a kind does not exist. BadInput: the scene allows no question of these kinds.
    """
    order = [str(kind) for kind in rng.permutation(list(kinds))]
    for kind in order:
        found = questions_about(scene, [kind])
        if kind in ("count", "exists"):  # most of them would be "zero" and "no"
            absent = [q for q in found if q.answer in ("zero", "no")]
            present = [q for q in found if q.answer not in ("zero", "no")]
            found = (absent if rng.random() < 0.5 else present) or found
        if found:
            return found[int(rng.integers(len(found)))]
    raise BadInput(f"no question of kind {', '.join(kinds)} can be asked of a scene with {len(scene.toys)} toys.")
