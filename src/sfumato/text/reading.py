"""How one tokenizer reads one prompt: which characters each position of the text axis stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from sfumato.models.chunks import chunks_of, ends, spaced

__all__ = ["SPECIAL", "StreamReading", "character_origins", "read_stream", "token_ids"]

#: Names of tokens that stand for no word: where the text starts, where it ends, and what fills the rest of the axis.
SPECIAL = ("<start>", "<end>", "<pad>")


@dataclass(frozen=True)
class StreamReading:
    """How one tokenizer stream reads one prompt.

    ``spans``: prompt characters [start, end) of each real token; token i lies at ``first + i`` on the text axis, or at
    ``at[i]`` where a system has laid the text out anew or it is read in several chunks. ``special``: positions of the
    special tokens by name. ``seen``: the first character that is not read any more. ``length``: positions in all.
    """

    first: int
    spans: tuple[tuple[int, int], ...]
    special: dict[str, tuple[int, ...]]
    seen: int
    length: int
    at: tuple[int, ...] = ()

    @property
    def places(self) -> tuple[int, ...]:
        """The position of each real token on the text axis."""
        return self.at or tuple(range(self.first, self.first + len(self.spans)))

    @property
    def offset(self) -> int:
        """Where the stream's part of the text axis begins."""
        return min((self.first, *self.special["<start>"]))


def token_ids(stream: Any, prompt: str) -> list[int]:
    """Ids of the real tokens of a prompt that an encoder reads, in the order of :attr:`StreamReading.spans`."""
    if stream.chunks > 1:
        found = chunks_of(stream.tokenizer, stream.prepare(prompt), stream.window)[: stream.chunks]
        return [i for chunk in found for i in chunk.ids[chunk.lead : chunk.lead + len(chunk.spans)]]
    encoded = _one_window(stream, stream.prepare(spaced(prompt)))
    return list(encoded.input_ids[slice(*ends(encoded))])


def _one_window(stream: Any, text: str) -> Any:
    options = {"truncation": True, "max_length": stream.length, "verbose": False}
    return stream.tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True, **options)


def read_stream(stream: Any, prompt: str) -> StreamReading:
    """A prompt on the axis of a :class:`~sfumato.models.families.TextStream`."""
    if stream.chunks > 1 and stream.window:
        return _read_chunks(stream, prompt)
    text = stream.prepare(spaced(prompt))
    full = _one_window(stream, text)
    lead, stop = ends(full)
    spans = _at_origins(full.offset_mapping[lead:stop], text, character_origins(prompt, text))
    cut = len(stream.tokenizer(text, verbose=False).input_ids) > stream.length
    base, size = stream.offset, len(full.input_ids)
    padding = range(base + size, base + (stream.length if stream.padded else size))
    if stream.left:
        padding = range(base, base + len(padding))
        base = padding.stop
    special = {
        "<start>": tuple(base + i for i in range(lead) if base + i >= 0),
        "<end>": tuple(base + i for i in range(stop, size)),
        "<pad>": tuple(padding),
    }
    seen = max((end for _, end in spans), default=0) if cut else len(prompt)
    return StreamReading(base + lead, spans, special, seen, stream.length)


def _read_chunks(stream: Any, prompt: str) -> StreamReading:
    """A prompt in several chunks, empty ones behind its end; each has special tokens of its own."""
    text = stream.prepare(prompt)
    origins, found = character_origins(prompt, text), chunks_of(stream.tokenizer, text, stream.window)
    read = found[: stream.chunks]
    read += chunks_of(stream.tokenizer, "", stream.window) * (stream.chunks - len(read))
    places: list[int] = []
    special: dict[str, list[int]] = {name: [] for name in SPECIAL}
    for k, chunk in enumerate(read):
        axis = range(stream.offset + k * stream.window, stream.offset + (k + 1) * stream.window)
        stop = chunk.lead + len(chunk.spans)
        special["<start>"] += axis[: chunk.lead]
        places += axis[chunk.lead : stop]
        special["<end>"] += axis[stop : stop + chunk.tail]
        special["<pad>"] += axis[stop + chunk.tail :]
    spans = _at_origins([span for chunk in read for span in chunk.spans], text, origins)
    seen = max((end for _, end in spans), default=0) if len(found) > stream.chunks else len(prompt)
    positions = {name: tuple(held) for name, held in special.items()}
    return StreamReading(stream.offset + read[0].lead, spans, positions, seen, stream.length, tuple(places))


def _at_origins(offsets: Sequence[tuple[int, int]], text: str, origins: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Characters of the prompt that each token of the prepared text stands for; (0, 0) for blanks."""
    held = [[origins[i] for i in range(a, b) if not text[i].isspace()] for a, b in offsets]
    return tuple((min(places), max(places) + 1) if places else (0, 0) for places in held)


def character_origins(prompt: str, prepared: str) -> Sequence[int]:
    """For each character of the text that the tokenizer is given, the character of the prompt it stands for.

    Pipelines may lower-case, strip, clean, or write out an added token as several ("<cat>" as "<cat> <cat>_1"); what
    was put in belongs to the last visible character before it.
    """
    if len(prepared) == len(prompt) and all(
        a == b or a.isspace() and b.isspace() for a, b in zip(prompt, prepared, strict=True)
    ):
        return range(len(prompt))
    lower = [char.lower() if len(char.lower()) == 1 else char for char in prompt]
    other = [char.lower() if len(char.lower()) == 1 else char for char in prepared]
    origins = [-1] * len(prepared)
    for a, b, size in SequenceMatcher(None, lower, other, autojunk=False).get_matching_blocks():
        origins[b : b + size] = range(a, a + size)
    last = 0
    for i, place in enumerate(origins):
        if place < 0:
            origins[i] = last
        elif not prompt[place].isspace():
            last = place
    return origins
