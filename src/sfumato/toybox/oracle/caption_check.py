"""What a caption asks for, read from its words: toys with their attributes, how many, and how they stand to each other.

Understands the toybox's own captions and freer ones with the same nouns ("two red cubes left of a ball"). Whatever it
does not know is passed over; a caption without any toy asks for nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sfumato.toybox import COLORS, PATTERNS, SHAPES, SIZES
from sfumato.toybox.oracle.presence import Check, RequestedToy, check, related
from sfumato.toybox.oracle.toy_judge import SceneReading

_KINDS = {word: kind for kind, words in (("color", COLORS), ("pattern", PATTERNS), ("size", SIZES)) for word in words}
_NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6} | {str(n): n for n in range(2, 7)}
_PLURALS = {shape + ("es" if shape.endswith("s") else "s"): shape for shape in SHAPES}
_RELATIONS = re.compile(r"\b(left of|right of|in front of|behind)\b")
# words after which another thing is described; anything else between an attribute and its noun is passed over
_BREAKS = frozenset("a an the and or with on by at in under to of next is are behind front , . ;".split())


@dataclass(frozen=True)
class Requested:
    """The toys a caption names, in its order, and its relations (first toy, relation, second toy) by index."""

    requests: tuple[RequestedToy, ...]
    relations: tuple[tuple[int, str, int], ...] = ()


def requested(text: str) -> Requested:
    """What ``text`` asks for; relations other than left of, right of, in front of and behind are not judged."""
    requests: list[RequestedToy] = []
    relations: list[tuple[int, str, int]] = []
    given: dict[str, str] = {}
    count, behind = 1, 0  # how many are announced; where the last toy's noun ended
    for match in re.finditer(r"\w+|[,.;]", text.lower()):
        word = match.group()
        shape = word if word in SHAPES else _PLURALS.get(word)
        if shape:
            many = count if word not in SHAPES or count == 1 else 1
            between = _RELATIONS.findall(text.lower()[behind : match.start()]) if requests else []
            if between:
                relations.append((len(requests) - 1, between[-1], len(requests)))
            requests += [RequestedToy(shape, **given)] * many
            given, count, behind = {}, 1, match.end()
        elif word in _KINDS:
            given[_KINDS[word]] = word
        elif word in _NUMBERS:
            given, count = {}, _NUMBERS[word]
        elif word in _BREAKS:
            given, count = {}, 1
    return Requested(tuple(requests), tuple(relations))


@dataclass(frozen=True)
class CaptionCheck:
    """One picture against its caption: the toys (:class:`Check`), and per relation whether it holds."""

    toys: Check
    related: tuple[bool, ...]
    exact: bool
    """Whether as many toys of the first request's shape and colour were read as are asked for."""

    def solved(self, task: str | None) -> bool:
        """Whether the picture does what the ``task`` (:mod:`.prompts`) is about; None: everything requested."""
        if task in ("one", "two"):
            return self.toys.all_present
        if task == "counting":
            return self.exact
        if task == "position":
            return bool(self.related) and all(self.related)
        if task in ("colors", "color_attribution"):
            return self.toys.all_bound
        return self.toys.all_bound and self.toys.counted and all(self.related)


def check_caption(
    reading: SceneReading, want: Requested, attributes: Sequence[str] = ("shape", "color")
) -> CaptionCheck:
    """Compares a reading with what a caption asks for. Raises BadInput when it asks for nothing."""
    found = check(reading, want.requests, attributes)
    requests = [request.only(*attributes) for request in want.requests]
    first = want.requests[0].only("shape", "color")
    meant = sum(request.only("shape", "color") == first for request in want.requests)
    return CaptionCheck(
        found,
        tuple(related(reading, requests[i], how, requests[j]) for i, how, j in want.relations),
        sum(first.fits(toy) for toy in reading.objects) == meant,
    )
