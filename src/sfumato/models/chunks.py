"""Texts longer than the window of a text encoder, read in chunks as A1111's web UI and compel read them.

What CLIP reads is cut into chunks of 75 tokens (the window without its start and end token), each is encoded by itself,
and the encodings follow each other on the text axis of attention. ``BREAK`` begins a new chunk. Pooled vectors are
those of the first chunk, as in both programs; T5 and language models read the text once, without chunks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sfumato.errors import BadInput, SfumatoError
from sfumato.models.condition import Rows, require_width
from sfumato.valid import first_line

if TYPE_CHECKING:
    from sfumato.models.families import Family, TextStream

__all__ = [
    "BREAK",
    "MARK",
    "Chunk",
    "chunks_of",
    "encode",
    "fits_plainly",
    "instead",
    "laid_out",
    "needed",
    "spaced",
    "unseen",
]

#: what stands for ``BREAK`` in a prompt that has been read: a blank to everybody else
MARK = "\f"
#: blanks before it are tried from the first of them only, or a text would take the square of their number
BREAK = re.compile(r"(?:(?<!\s)\s+)?(?:\bBREAK\b|\f)\s*")
#: the text axis of 64 windows of CLIP holds 4,928 positions, more than any image has in one layer of attention
MOST = 64


@dataclass(frozen=True)
class Chunk:
    """One window of a text: its token ``ids``, special ones included and without padding; the characters [a, b) of the
    text that each real token stands for; how many special tokens stand before and behind these."""

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    lead: int
    tail: int


def spaced(text: str) -> str:
    """The text as an encoder reads it that knows no chunks: a blank in place of every ``BREAK``."""
    return BREAK.sub(" ", text).strip() if BREAK.search(text) else text


def chunks_of(tokenizer: Any, text: str, window: int) -> list[Chunk]:
    """The chunks of a text, at least one; a ``BREAK`` with nothing before or behind it begins none."""
    found = []
    for start, end in _between_breaks(text):
        encoded = tokenizer(
            text[start:end], return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False
        )
        lead, stop = ends(encoded)
        ids, size = encoded.input_ids, len(encoded.input_ids)
        room = max(window - lead - (size - stop), 1)
        spans = [(start + a, start + b) for a, b in encoded.offset_mapping]
        for i in range(lead, max(stop, lead + 1), room):
            j = min(i + room, stop)
            found.append(Chunk((*ids[:lead], *ids[i:j], *ids[stop:]), tuple(spans[i:j]), lead, size - stop))
    return [chunk for chunk in found if chunk.spans] or found[:1]


def ends(encoded: Any) -> tuple[int, int]:
    """[first, last) of the real tokens of an encoding: a special token typed by the user has characters of its own,
    those the tokenizer adds have none."""
    pairs = zip(encoded.special_tokens_mask, encoded.offset_mapping, strict=True)
    added = [bool(mask) and a == b for mask, (a, b) in pairs]
    lead = next((i for i, is_added in enumerate(added) if not is_added), 1 if len(added) > 1 else 0)
    stop = len(added) - next((i for i, is_added in enumerate(reversed(added)) if not is_added), len(added) - lead)
    return lead, stop


def _between_breaks(text: str) -> Iterator[tuple[int, int]]:
    start = 0
    for found in BREAK.finditer(text):
        yield start, found.start()
        start = found.end()
    yield start, len(text)


def needed(streams: Sequence[TextStream], texts: Sequence[str]) -> int:
    """How many chunks the longest of ``texts`` takes. Raises BadInput for more than any model can attend to."""
    most = 1
    for stream in streams:
        if stream.window is not None:
            for text in dict.fromkeys(texts):
                most = max(most, len(chunks_of(stream.tokenizer, stream.prepare(text), stream.window)))
    if most > MOST:
        raise BadInput(f"a prompt takes {most} chunks of a text encoder's window; at most {MOST} are read.")
    return most


def unseen(stream: TextStream, text: str) -> str:
    """The end of a text that its encoder does not read."""
    full = stream.prepare(text)
    if stream.window and stream.chunks > 1:
        found = chunks_of(stream.tokenizer, full, stream.window)
        return full[found[stream.chunks - 1].spans[-1][1] :].strip() if len(found) > stream.chunks else ""
    full = spaced(full)
    if len(stream.tokenizer(full, verbose=False).input_ids) <= stream.length:
        return ""
    cut = {"truncation": True, "max_length": stream.length, "return_offsets_mapping": True, "verbose": False}
    return full[max(end for _, end in stream.tokenizer(full, **cut).offset_mapping) :].strip()


def laid_out(streams: Sequence[TextStream], chunks: int | None) -> list[TextStream]:
    """The streams of a text axis of so many chunks; 0: none is read in chunks; None: as many as a text needs."""
    if chunks is None:
        return list(streams)
    if chunks == 0:
        return [replace(stream, window=None) for stream in streams]
    more = {stream.offset: (chunks - 1) * stream.window for stream in streams if stream.window}
    out = []
    for stream in streams:
        behind = sum(length for offset, length in more.items() if offset < stream.offset)
        length = stream.window * chunks if stream.window else stream.length
        out.append(replace(stream, offset=stream.offset + behind, length=length, chunks=chunks))
    return out


def fits_plainly(streams: Sequence[TextStream], chunks: int) -> bool:
    """Whether the pipeline's own encoding is all there is to do."""
    return chunks <= 1 or not any(stream.window for stream in streams)


def encode(
    family: Family, texts: list[str], negatives: list[str] | None, guidance: bool, chunks: int
) -> tuple[Rows, Rows | None]:
    """Rows of the conditional and of the unconditional branch, of so many chunks both: shorter texts are followed by
    empty chunks. One chunk is the pipeline's own encoding, bit for bit. Raises BadInput for what the denoiser cannot
    read."""
    if fits_plainly(family.streams, chunks):
        plain = None if negatives is None else list(map(spaced, negatives))
        return _read(family, list(map(spaced, texts)), plain, guidance)
    conds, unconds = [], []
    for index in range(chunks):
        with _only(family, index):
            cond, uncond = _read(family, texts, negatives, guidance)
        conds.append(cond)
        unconds.append(uncond)
    held = [rows for rows in unconds if rows is not None]
    return family.joined(conds), family.joined(held) if held else None


def _read(family: Family, texts: list[str], negatives: list[str] | None, guidance: bool) -> tuple[Rows, Rows | None]:
    name = type(family.pipe).__name__
    try:
        cond, uncond = family.encode(texts, negatives, guidance)
    except SfumatoError:
        raise
    except (IndexError, ValueError) as error:  # tokens or positions that an encoder's tables do not have
        raise BadInput(
            f"the text encoders of this {name} cannot read what its tokenizers make of a prompt ({first_line(error)}); "
            f"load it with the text encoders that it was trained with, and their tokenizers."
        ) from error
    require_width(cond, family.config, name)
    return cond, uncond


@contextmanager
def _only(family: Family, index: int) -> Iterator[None]:
    """While it lasts, the pipeline's tokenizers read one chunk of every text, those without chunks the text itself."""
    with ExitStack() as stack:
        for stream in family.streams:
            own = stream.tokenizer
            part = _OneChunk(own, stream.window, index) if stream.window else _Spaced(own)
            stack.enter_context(instead(family.pipe, stream.attribute, part))
        for name in family.read_once if index else ():
            stack.enter_context(instead(family.pipe, name, None))
        yield


@contextmanager
def instead(pipe: Any, attribute: str, value: Any) -> Iterator[None]:
    """``value`` for an attribute of a pipeline that does not register it, so that its configuration stays the same."""
    before = getattr(pipe, attribute)
    object.__setattr__(pipe, attribute, value)
    try:
        yield
    finally:
        object.__setattr__(pipe, attribute, before)


class _Spaced:
    """A tokenizer to which ``BREAK`` is a blank."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, text: str | list[str], *args: Any, **options: Any) -> Any:
        return self.tokenizer(spaced(text) if isinstance(text, str) else list(map(spaced, text)), *args, **options)


class _OneChunk(_Spaced):
    """A tokenizer that reads one chunk of every text, an empty one behind its end."""

    def __init__(self, tokenizer: Any, window: int, index: int):
        super().__init__(tokenizer)
        self.window, self.index = window, index
        self.empty = chunks_of(tokenizer, "", window)[0]

    def __call__(self, text: str | list[str], *_: Any, **options: Any) -> Any:
        ids = []
        for each in [text] if isinstance(text, str) else text:
            chunks = chunks_of(self.tokenizer, each, self.window)
            ids.append(list((chunks[self.index] if self.index < len(chunks) else self.empty).ids))
        kept = {name: options[name] for name in ("padding", "max_length", "return_tensors") if name in options}
        return self.tokenizer.pad({"input_ids": ids}, verbose=False, **kept)
