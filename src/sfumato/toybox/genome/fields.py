"""From JSON to records, in every spelling that the releases of Visual Genome and its users' files have.

Images are named ``image_id`` or ``id``; objects, relationships, regions and questions likewise have an id of their own
name or plain ``id``; boxes have ``w``/``h`` or ``width``/``height``; embedded objects ``name`` or ``names``; synsets
are texts or objects with a ``synset_name``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from ... import valid
from ...errors import BadInput
from .records import (
    GenomeImage,
    GenomeObject,
    GenomeQuestion,
    GenomeRegion,
    GenomeRelationship,
    Mention,
    Number,
)


class Fields:
    """One JSON object, read field by field. ``place`` says where it stands; every error names it and the field.

    ``within``: the object it is in; then ``place`` is what follows that one's place, or a function that says it, called
    where something is wrong alone.
    """

    def __init__(self, raw: Any, place: str | Callable[[], str], within: Fields | None = None):
        self.raw, self._place, self._within = raw, place, within
        if not isinstance(raw, dict):
            raise BadInput(f"{self.place} is {valid.brief(raw)}; it must be a JSON object.")

    @property
    def place(self) -> str:
        here = self._place if isinstance(self._place, str) else self._place()
        return here if self._within is None else f"{self._within.place}, {here}"

    def _one(self, names: tuple[str, ...]) -> Any:
        """The value under one of these names. Raises BadInput where there is none, or where two differ."""
        value = None
        for name in names:
            other = self.raw.get(name)
            if other is None:
                continue
            if value is not None and other != value:
                both = " but ".join(f"{n} {valid.brief(self.raw[n])}" for n in names if self.raw.get(n) is not None)
                raise BadInput(f"{self.place} has {both}; they must agree.")
            value = other
        if value is None:
            keys = ", ".join(map(str, list(self.raw)[:10])) or "nothing"
            raise BadInput(f"{self.place} has no {' or '.join(names)}; it has {keys}.")
        return value

    def has(self, *names: str) -> bool:
        return any(self.raw.get(name) is not None for name in names)

    def whole(self, *names: str) -> int:
        """An id or a count: a whole number of 0 or more."""
        value = self._one(names)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
            raise BadInput(f"{self.place}: {names[0]} is {valid.brief(value)}; it must be a whole number from 0.")
        return value

    def number(self, *names: str) -> Number:
        """A coordinate or a length."""
        value = self._one(names)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise BadInput(f"{self.place}: {names[0]} is {valid.brief(value)}; it must be a number.")
        return int(value) if isinstance(value, float) and value.is_integer() else value

    def text(self, *names: str) -> str:
        return self._text(self._one(names), names[0])

    def _text(self, value: Any, name: str) -> str:
        if not isinstance(value, str) or valid.wrong(value):
            valid.text(value, f"{self.place}: {name}")
        return value

    def several(self, *names: str) -> list[Any]:
        """A list; an empty one where there is none."""
        if not self.has(*names):
            return []
        value = self._one(names)
        if not isinstance(value, list):
            raise BadInput(f"{self.place}: {names[0]} is {valid.brief(value)}; it must be a list.")
        return value

    def texts(self, *names: str) -> tuple[str, ...]:
        return tuple(self._text(each, names[0]) for each in self.several(*names))

    def synsets(self) -> tuple[str, ...]:
        """Names of synsets, which are texts in some files and objects in others."""
        return tuple(
            Fields(each, "synsets", self).text("synset_name") if isinstance(each, dict) else self._text(each, "synsets")
            for each in self.several("synsets")
        )

    def box(self) -> tuple[Number, Number, Number, Number]:
        return self.number("x"), self.number("y"), self.number("w", "width"), self.number("h", "height")

    def inner(self, name: str, kind: str, *ids: str) -> Iterator[Fields]:
        """The objects of a list, each with its number, or its id, in its place."""
        for index, each in enumerate(self.several(name)):

            def place(index: int = index, each: Any = each) -> str:
                told = next((each[key] for key in ids if isinstance(each, dict) and each.get(key) is not None), None)
                return f"{kind} number {index + 1}" if told is None else f"{kind} {valid.brief(told)}"

            yield Fields(each, place, self)


def image(of: Fields) -> GenomeImage:
    return GenomeImage(
        of.whole("image_id", "id"),
        of.whole("width"),
        of.whole("height"),
        of.text("url") if of.has("url") else "",
        of.whole("coco_id") if of.has("coco_id") else None,
        of.whole("flickr_id") if of.has("flickr_id") else None,
    )


def thing(of: Fields) -> GenomeObject:
    """An object as it stands in objects.json, embedded in relationships, in graphs or in questions."""
    names = of.texts("names") or ((of.text("name"),) if of.has("name") else ())
    merged = of.several("merged_object_ids")
    if any(isinstance(each, bool) or not isinstance(each, int) for each in merged):
        raise BadInput(f"{of.place}: merged_object_ids is {valid.brief(merged)}; they must be whole numbers.")
    attributes = of.texts("attributes")
    return GenomeObject(
        of.whole("object_id", "id"), *of.box(), names=names, synsets=of.synsets(), attributes=attributes,
        merged=tuple(merged),
    )  # fmt: skip


def relationship(of: Fields) -> GenomeRelationship:
    """By ids, or with its two objects embedded."""
    ends = []
    for end in ("subject", "object"):
        embedded = of.raw.get(end)
        if isinstance(embedded, dict):
            ends.append(Fields(embedded, end, of).whole("object_id", "id"))
        else:
            ends.append(of.whole(f"{end}_id"))
    own, predicate = of.whole("relationship_id", "id"), of.text("predicate")
    return GenomeRelationship(own, predicate, ends[0], ends[1], of.synsets())


def region(of: Fields, image_id: int) -> GenomeRegion:
    if of.has("image_id", "image") and (named := of.whole("image_id", "image")) != image_id:
        raise BadInput(f"{of.place}: image_id is {named}, but it stands under image {image_id}.")
    mentions = []
    for each in of.inner("synsets", "synset"):
        start, end = each.whole("entity_idx_start"), each.whole("entity_idx_end")
        mentions.append(Mention(each.text("entity_name"), start, end, each.text("synset_name")))
    x, y, width, height = of.box()
    return GenomeRegion(
        of.whole("region_id", "id"), image_id, x, y, width, height, of.text("phrase"), tuple(mentions)
    )  # fmt: skip


def question(of: Fields, image_id: int) -> GenomeQuestion:
    if of.has("image_id") and (named := of.whole("image_id")) != image_id:
        raise BadInput(f"{of.place}: image_id is {named}, but it stands under image {image_id}.")
    about, told = (tuple(thing(each) for each in of.inner(key, "object")) for key in ("q_objects", "a_objects"))
    return GenomeQuestion(of.whole("qa_id", "id"), image_id, of.text("question"), of.text("answer"), about, told)
