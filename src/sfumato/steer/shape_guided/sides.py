"""The text axis cut into sides: which of its positions belong to which region, and which to the outside."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher

import torch
from torch import Tensor

from sfumato.errors import BadInput, NotSupported
from sfumato.models import Model
from sfumato.steer.shape_guided.pieces import Piece
from sfumato.text.words import Reading, StreamReading, Words, token_ids


class Sides:
    """Which positions of the text axis belong to which side: ``groups`` texts, the last of them the outside.

    Every stretch of the axis (one per text encoder; two that share positions are one stretch) is cut into ``groups``
    equal parts behind its start token; what is left over belongs to none.
    """

    def __init__(self, model: Model, groups: int):
        self.words, self.groups = Words(model), groups
        self.stretches: dict[str, tuple[int, int]] = {}  # stream -> (first position, length of a part)
        self.rooms: dict[str, int] = {}  # stream -> most tokens of a text, which is encoded in one window
        for stream in model.tokenizers:
            if not stream.padded:
                raise NotSupported(
                    f"shape_guided lays texts side by side on the text axis, and {model.name} has none of fixed length."
                )
            lead = len(self.words.read("").streams[stream.name].special["<start>"])
            self.stretches[stream.name] = stream.offset + lead, (stream.length - lead) // groups
            self.rooms[stream.name] = min(self.stretches[stream.name][1], (stream.window or stream.length) - lead - 1)

    def part(self, stream: str, group: int) -> slice:
        first, length = self.stretches[stream]
        return slice(first + group * length, first + (group + 1) * length)

    def own(self, length: int) -> Tensor:
        """(groups t): 1 where a position belongs to a group."""
        own = torch.zeros(self.groups, length)
        for stream in self.stretches:
            for group in range(self.groups):
                own[group, self.part(stream, group)] = 1
        return own

    def reading(self, prompt: str, pieces: Sequence[Piece]) -> Reading:
        """Where the words of a prompt lie when ``pieces``, one per group, stand side by side in its place."""
        streams = {}
        for name, plain in self.words.read(prompt).streams.items():
            tokens: list[tuple[tuple[int, int], int]] = []
            special: dict[str, list[int]] = {"<end>": [], "<pad>": []}
            for group, piece in enumerate(pieces):
                part, spans = self.part(name, group), self.words.read(piece.text).streams[name].spans
                for position, (a, b) in zip(range(part.start, part.stop), spans, strict=False):
                    places = [place for place in piece.origins[a:b] if place >= 0]
                    if places:
                        tokens.append(((min(places), max(places) + 1), position))
                end, *padding = [*range(part.start + len(spans), part.stop)] or [part.stop - 1]
                special["<end>"].append(end)
                special["<pad>"] += padding
            tokens.sort()
            streams[name] = StreamReading(
                first=plain.first,
                spans=tuple(span for span, _ in tokens),
                special={
                    "<start>": (plain.offset,) if plain.offset < plain.first else (),
                    **{key: tuple(each) for key, each in special.items()},
                },
                seen=len(prompt),
                length=plain.length,
                at=tuple(position for _, position in tokens),
            )
        return Reading(prompt, streams)

    def check_lengths(self, texts: Sequence[str]) -> None:
        """Raise BadInput for a text that does not fit into its part of the axis."""
        for text in texts:
            for name, stream in self.words.read(text).streams.items():
                if len(stream.spans) > self.rooms[name]:
                    raise BadInput(
                        f"{text[:60]!r} has {len(stream.spans)} {name} tokens; beside the other texts of shape_guided "
                        f"there is room for {self.rooms[name]}."
                    )

    def fixed(self, before: str, after: str, group: int, length: int) -> Tensor:
        """(t): True for tokens of ``after`` that ``before`` has too, in matching order, in every encoder that reads
        that position."""
        matches = torch.zeros(length)
        readers = torch.zeros(length)
        for stream in self.words.streams:
            part = self.part(stream.name, group)
            old, new = (token_ids(stream, text) for text in (before, after))
            readers[part.start : part.start + len(new)] += 1
            for _, at, size in SequenceMatcher(None, old, new, autojunk=False).get_matching_blocks():
                matches[part.start + at : part.start + at + size] += 1
        return (matches == readers) & (readers > 0)
