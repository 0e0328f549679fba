"""The texts of the inside and of the outside, as parts of the prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sfumato.errors import BadInput
from sfumato.text.weights import WeightedPrompt
from sfumato.text.words import Words, character_origins, noun_phrases


@dataclass(frozen=True)
class Piece:
    """A text in the place of a part of the prompt. ``origins``: the place in the prompt of each of its characters, -1
    for those that do not; empty: none does."""

    text: str
    origins: tuple[int, ...] = ()


def split(words: Words, prompt: str, wanted: Sequence[str]) -> tuple[list[Piece], Piece]:
    """The texts of the regions, a phrase per wanted word, and what the prompt says besides; the whole prompt and
    nothing when no word is wanted. Raises NoMatch."""
    if not wanted:
        return [Piece(prompt, tuple(range(len(prompt))))], Piece("")
    chunks = noun_phrases(prompt)
    inside: list[Piece] = []
    cut: list[tuple[int, int]] = []
    for word in wanted:
        spans: list[tuple[int, int]] = []
        for found in words.find(prompt, word):
            if found.start < 0:
                raise BadInput(f"words of shape_guided has {word}: special tokens are nothing to draw.")
            chunk = next((c for c in chunks if c.start <= found.start and found.end <= c.end), found)
            spans.append((chunk.start, chunk.end))
        inside.append(joined([Piece(prompt[a:b], tuple(range(a, b))) for a, b in dict.fromkeys(spans)]))
        cut += spans
    rest = list(prompt)
    for a, b in cut:
        rest[a:b] = ["\0"] * (b - a)
    left = "".join(rest)
    text = re.sub(r"\s*,\s*(?=and\b|or\b)", " ", re.sub(r"\s+", " ", left.replace("\0", ""))).replace(" ,", ",")
    text = re.sub(
        r"^(?:(?:and|or|with|of)\b[\s,]*)+|[\s,]*\b(?:and|or|with|of|to|on|in|at|by|next)$", "", text.strip(" ,.;")
    ).strip(" ,.;")
    return inside, Piece(text, tuple(character_origins(left, text)))


def refuse_overlaps(prompt: str, wanted: Sequence[str], phrases: Sequence[Piece]) -> None:
    """Raise BadInput where two regions would show the same words."""
    for i, one in enumerate(phrases):
        for j in range(i):
            if {place for place in one.origins if place >= 0} & set(phrases[j].origins):
                raise BadInput(
                    f"words of shape_guided overlap: {wanted[j]!r} and {wanted[i]!r} both stand in {one.text!r} of "
                    f"{prompt!r}; give each region words of its own."
                )


def plain(text: str) -> WeightedPrompt:
    return WeightedPrompt(text, (1.0,) * len(text))


def joined(pieces: Sequence[Piece]) -> Piece:
    """Several texts as one."""
    between = (" and ", (-1,) * 5)
    text, origins = pieces[0].text, pieces[0].origins
    for piece in pieces[1:]:
        text, origins = text + between[0] + piece.text, origins + between[1] + piece.origins
    return Piece(text, origins)
