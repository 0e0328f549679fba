"""What Visual Genome would say about a toybox picture, all of it true by construction.

Objects are the toys that are seen, and the ground and sky around them. Relationships are those of the captions (left
of, right of, in front of, behind, next to: one for each ordered pair of toys, see :meth:`.Scene.relation`), "on" the
ground and "under" the sky. Nothing is inside anything here. Questions begin with what, where and how; who, when and why
have no answers in this world and are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..captions import SKY_PHRASES
from ..questions import questions_about
from ..scene import Scene
from . import records as vg

#: word -> (synset, what it means here). Names in WordNet's form, as Visual Genome has them; senses chosen by hand.
SYNSETS = {
    "ball": ("ball.n.01", "a round toy that rolls every way"),
    "cube": ("cube.n.01", "a toy with six equal square faces"),
    "cylinder": ("cylinder.n.01", "a toy with a round base, a round top and straight sides"),
    "cone": ("cone.n.01", "a toy with a round base and a pointed top"),
    "ring": ("ring.n.02", "a toy like a hoop, open in the middle"),
    "cross": ("cross.n.01", "a toy of two bars across each other"),
    "grass": ("grass.n.01", "ground with low green plants"),
    "sand": ("sand.n.01", "ground of loose fine grains"),
    "snow": ("snow.n.02", "ground covered by frozen white flakes"),
    "wood": ("wood.n.01", "a floor of boards"),
    "tiles": ("tile.n.01", "a floor of flat square plates"),
    "sky": ("sky.n.01", "what is seen above the ground"),
    "red": ("red.s.01", "of the colour of blood"),
    "orange": ("orange.s.01", "of the colour between red and yellow"),
    "yellow": ("yellow.s.01", "of the colour of a lemon"),
    "green": ("green.s.01", "of the colour of leaves"),
    "blue": ("blue.a.01", "of the colour of a clear sky"),
    "purple": ("purple.s.01", "of the colour between red and blue"),
    "white": ("white.a.01", "of the colour of fresh snow"),
    "black": ("black.a.01", "of the colour of coal"),
    "plain": ("plain.s.01", "of one colour all over"),
    "striped": ("striped.a.01", "with bands of two colours"),
    "dotted": ("dotted.s.01", "with spots of another colour"),
    "checkered": ("checkered.s.01", "with squares of two colours by turns"),
    "small": ("small.a.01", "of the lesser of two heights"),
    "large": ("large.a.01", "of the greater of two heights"),
    "day": ("day.n.04", "the time of light"),
    "sunset": ("sunset.n.01", "the time when the sun goes down"),
    "night": ("night.n.01", "the time of darkness"),
    "fog": ("fog.n.01", "drops in the air that hide what is far"),
    "clouds": ("cloud.n.02", "grey masses that cover the sky"),
    "left of": ("left.r.01", "nearer to the left side of the picture"),
    "right of": ("right.r.04", "nearer to the right side of the picture"),
    "in front of": ("ahead.r.01", "nearer to the camera"),
    "behind": ("behind.r.01", "farther from the camera"),
    "next to": ("next.r.01", "close by, on no clear side"),
    "on": ("along.r.01", "standing upon"),
    "under": ("under.r.01", "with it overhead"),
}
RELATIONS = ("left of", "right of", "in front of", "behind", "next to", "on", "under")
ALIASES = (("next to", "near", "beside", "by"), ("left of", "to the left of"), ("right of", "to the right of"))


@dataclass
class Counter:
    """The next free ids: they are unique over all images."""

    object: int = 1
    relationship: int = 1
    region: int = 1
    question: int = 1

    def take(self, kind: str) -> int:
        value = getattr(self, kind)
        setattr(self, kind, value + 1)
        return value


def box_of(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """x, y, width, height of the pixels (h w) that are set; None where none is."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return None
    x, y = int(columns[0]), int(rows[0])
    return x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y


def record_of(scene: Scene, mask: np.ndarray, depth: np.ndarray, image_id: int, ids: Counter) -> vg.GenomeRecord:
    """All records of one picture.

    Args:
        scene: what is in it.
        mask: (h w) index of the toy each pixel shows, -1 for none. depth: (h w), infinite where the sky is seen.
        image_id: its number.
        ids: the next free ids, which move on.
    """
    height, width = mask.shape
    things: dict[str | int, vg.GenomeObject] = {}
    for i, toy in enumerate(scene.toys):
        if (box := box_of(mask == i)) is not None:
            words = (toy.color, toy.surface, toy.size)
            things[i] = _thing(ids, box, toy.shape, words if toy.surface == toy.pattern else (toy.color, toy.size))
    behind = mask < 0
    for name, shown in ((scene.ground, behind & np.isfinite(depth)), ("sky", behind & ~np.isfinite(depth))):
        if (box := box_of(shown)) is not None:
            things[name] = _thing(ids, box, name, (scene.sky,) if name == "sky" else ())
    links = [_link(ids, *each) for each in _related(scene, things)]
    graph = vg.GenomeGraph(image_id, tuple(things.values()), tuple(links))
    linked = list(_regions(scene, things, links, image_id, ids))
    regions = {key: each.region.id for key, each in zip(things, linked, strict=False)}  # one for each thing, in order
    image = vg.GenomeImage(image_id, width, height, f"https://toybox.invalid/rak248/VG_100K/{image_id}.jpg")
    asked = tuple(_questions(scene, things, links, image_id, ids, regions))
    return vg.GenomeRecord(image, graph, tuple(each.region for each in linked), tuple(linked), asked)


def _thing(ids: Counter, box: tuple[int, int, int, int], name: str, attributes: Sequence[str]) -> vg.GenomeObject:
    return vg.GenomeObject(ids.take("object"), *box, (name,), (SYNSETS[name][0],), tuple(attributes))


def _related(
    scene: Scene, things: dict[str | int, vg.GenomeObject]
) -> Iterator[tuple[vg.GenomeObject, str, vg.GenomeObject]]:
    toys = [i for i in range(len(scene.toys)) if i in things]
    for i in toys:
        for j in toys:
            if i != j:
                yield things[i], scene.relation(i, j), things[j]
        if scene.ground in things:
            yield things[i], "on", things[scene.ground]
    if "sky" in things and scene.ground in things:
        yield things[scene.ground], "under", things["sky"]


def _link(ids: Counter, subject: vg.GenomeObject, predicate: str, object: vg.GenomeObject) -> vg.GenomeRelationship:
    return vg.GenomeRelationship(ids.take("relationship"), predicate, subject.id, object.id, (SYNSETS[predicate][0],))


class _Phrase:
    """A phrase that grows word by word and remembers which characters mean what."""

    def __init__(self) -> None:
        self.text = ""
        self.mentions: list[vg.Mention] = []

    def say(self, words: str, meant: bool = False) -> _Phrase:
        self.text += " " if self.text else ""
        start = len(self.text)
        self.text += words
        if meant:
            self.mentions.append(vg.Mention(words, start, len(self.text), SYNSETS[words][0]))
        return self

    def thing(self, it: vg.GenomeObject, article: str = "a") -> _Phrase:
        """ "a large red striped ball"; what is plain is not said."""
        said = [word for word in reversed(it.attributes) if word != "plain"]
        order = [*said[:1], *said[:0:-1]] if len(said) > 2 else said  # size, colour, pattern
        first = (order or [it.name])[0]
        self.say("an" if article == "a" and first[0] in "aeiou" else article)
        for word in order:
            self.say(word, True)
        return self.say(it.name, True)

    def scenery(self, it: vg.GenomeObject) -> _Phrase:
        """ "the grass", "the sky at night"."""
        self.say("the").say(it.name, True)
        for word in it.attributes:
            preposition, article, _ = SKY_PHRASES[word]
            self.say(" ".join(filter(None, ("with" if word == "clouds" else preposition, article)))).say(word, True)
        return self


def _union(*things: vg.GenomeObject) -> tuple[int, int, int, int]:
    x, y = min(int(t.x) for t in things), min(int(t.y) for t in things)
    return x, y, max(int(t.x + t.w) for t in things) - x, max(int(t.y + t.h) for t in things) - y


def _regions(
    scene: Scene, things: dict[str | int, vg.GenomeObject], links: list[vg.GenomeRelationship], image_id: int,
    ids: Counter,
) -> Iterator[vg.RegionGraph]:  # fmt: skip
    """One region for each thing, in order, and one for each relationship of a toy, each with its graph."""
    by_id = {each.id: each for each in things.values()}

    def region(phrase: _Phrase, *named: vg.GenomeObject) -> vg.GenomeRegion:
        box = _union(*named)
        return vg.GenomeRegion(ids.take("region"), image_id, *box, phrase.text, tuple(phrase.mentions))

    for key, it in things.items():
        phrase = _Phrase().scenery(it) if isinstance(key, str) else _Phrase().thing(it)
        yield vg.RegionGraph(region(phrase, it), (it,))
    toys = {things[i].id for i in range(len(scene.toys)) if i in things}
    for link in links:
        subject, object = by_id[link.subject_id], by_id[link.object_id]
        if subject.id not in toys:
            continue
        phrase = _Phrase().thing(subject)
        if link.predicate in ("left of", "right of"):
            phrase.say("to the")
        phrase.say(link.predicate, True)
        if object.id in toys:
            phrase.thing(object)
        else:
            phrase.scenery(object)
        yield vg.RegionGraph(region(phrase, subject, object), (subject, object), (link,))


def _questions(
    scene: Scene, things: dict[str | int, vg.GenomeObject], links: list[vg.GenomeRelationship], image_id: int,
    ids: Counter, regions: dict[str | int, int],
) -> Iterator[vg.GenomeQuestion]:  # fmt: skip
    """What, where and how many; only of toys that are seen, or, in counts, if all of them are."""
    seen = all(i in things for i in range(len(scene.toys)))
    for each in questions_about(scene, ("color", "shape", "pattern", "count", "half")):
        if not all(i in things for i in each.objects) or (each.kind == "count" and (not seen or each.answer == "zero")):
            continue
        named = tuple(things[i] for i in each.objects)
        text, answer = each.text.removesuffix(" ?"), each.answer
        if each.kind == "half":
            text, answer = f"where is {text.removeprefix('on which side is ')}", f"on the {answer}"
        yield vg.GenomeQuestion(
            ids.take("question"), image_id, f"{text[0].upper()}{text[1:]}?", answer, named,
            region_id=None if each.kind == "count" else regions[each.objects[0]],
        )  # fmt: skip
    for key, it in things.items():
        if isinstance(key, str) or [other.name for other in things.values()].count(it.name) > 1:
            continue
        for predicate in RELATIONS[:4]:
            found = [link for link in links if (link.predicate, link.object_id) == (predicate, it.id)]
            if len(found) == 1:
                told = next(each for each in things.values() if each.id == found[0].subject_id)
                where = f"to the {predicate}" if predicate.endswith(" of") and "front" not in predicate else predicate
                yield vg.GenomeQuestion(
                    ids.take("question"), image_id, f"What is {where} the {it.name}?",
                    f"{told.attributes[0]} {told.name}", (it,), (told,),
                )  # fmt: skip
