"""Words of a prompt as token spans, by character offsets, for every tokenizer that attention sees.

Search happens in the prompt as written (case and amount of blanks do not matter, whole words only), never in sub-token
strings; fast tokenizers then tell which tokens a stretch of characters became. So "cat" is not found in "category",
repeated words stay apart, and lower-casing, byte fallback and emoji cost nothing.
"""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sfumato.errors import BadInput, NoMatch, NotSupported, nearest
from sfumato.models.chunks import laid_out, needed
from sfumato.models.condition import TruncatedPrompt
from sfumato.text.phrases import NounPhrase, noun_phrases
from sfumato.text.reading import SPECIAL, StreamReading, character_origins, read_stream, token_ids

__all__ = [
    "NounPhrase",
    "Reading",
    "SPECIAL",
    "StreamReading",
    "WordSpan",
    "Words",
    "find_phrases",
    "character_origins",
    "noun_phrases",
    "token_ids",
]

# An added token such as <my-cat>, or a run without blanks; the latter is then split at punctuation.
_RUN = re.compile(r"(<[\w-]+>)|\S+")
# Scripts written without blanks, where "whole words only" has no meaning.
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")


@dataclass(frozen=True)
class WordSpan:
    """A word, phrase or special token of one prompt.

    ``text`` as written, at characters [``start``, ``end``) of the prompt (-1 for special tokens); ``occurrence`` counts
    from 1 among ``of`` equal ones. ``tokens`` gives, per tokenizer stream ("clip", "clip2", "t5"), positions on the
    text axis of attention; add a site's ``text[0]`` to get its key columns. An empty tuple: not seen by that stream.
    """

    text: str
    start: int
    end: int
    occurrence: int
    of: int
    tokens: dict[str, tuple[int, ...]]

    @property
    def label(self) -> str:
        """Unique within the prompt: the text, with "#2" for the second of several."""
        return self.text if self.of == 1 else f"{self.text}#{self.occurrence}"

    @property
    def positions(self) -> tuple[int, ...]:
        """All positions on the text axis, of all streams, each once."""
        return tuple(sorted({position for part in self.tokens.values() for position in part}))


@dataclass(frozen=True)
class Reading:
    """A prompt as the text encoders read it; finds words in it. Plain data: it needs no tokenizer any more."""

    prompt: str
    streams: dict[str, StreamReading]

    # -- looking up ----------------------------------------------------------------------------------------------------

    def find(self, phrase: str, occurrence: int | None = None) -> list[WordSpan]:
        """Every occurrence of a word or phrase, in order, kept apart; with ``occurrence`` (from 1) only that one.

        ``"cube#2"`` is the same as ``occurrence=2``; ``"<start>"``, ``"<end>"`` and ``"<pad>"`` name special tokens.
        Warns TruncatedPrompt where an encoder sees only part of a phrase. Raises NoMatch, with the nearest words of the
        prompt, when it does not occur or no encoder sees it; BadInput for an empty phrase or an occurrence below 1.
        """
        phrase, occurrence = self._split_number(phrase, occurrence)
        spans = _occurrences(self.prompt, phrase)
        if not spans and phrase in SPECIAL:
            word = self._special(phrase)
            if not word.positions:
                raise NoMatch(f"this prompt has no {phrase} token in any text encoder ({self._lengths()}).")
            return [word]
        if not spans:
            raise self._unknown(phrase)
        found = [self._word(start, end, i, len(spans)) for i, (start, end) in enumerate(spans, 1)]
        if occurrence is not None:
            if occurrence > len(found):
                times = "once" if len(found) == 1 else f"{len(found)} times"
                raise NoMatch(f"occurrence={occurrence} of {phrase!r} was asked for, but the prompt has it {times}.")
            found = [found[occurrence - 1]]
        read = [word for word in found if word.positions]
        if not read and all(found[0].start >= stream.seen for stream in self.streams.values()):
            raise NoMatch(
                f"{phrase!r} lies beyond what the text encoders read ({self._lengths()}); shorten the prompt."
            )
        if not read:
            raise NoMatch(f"{phrase!r} is in the prompt, but in none of the texts that were put in its place.")
        for word in read:
            self._warn_if_cut(word)
        return read

    def one(self, phrase: str, occurrence: int | None = None) -> WordSpan:
        """As :meth:`find`, for exactly one. Raises BadInput when the phrase occurs several times and none is chosen."""
        found = self.find(phrase, occurrence)
        if len(found) > 1:
            choices = " or ".join(repr(word.label) for word in found)
            raise BadInput(f"{phrase!r} occurs {len(found)} times in the prompt; say which: {choices}.")
        return found[0]

    def span(self, start: int, end: int) -> WordSpan:
        """The tokens of characters [start, end) of the prompt. Raises BadInput outside of it, NoMatch if unseen."""
        if not 0 <= start < end <= len(self.prompt):
            raise BadInput(f"characters {start}:{end} do not lie in the prompt, which has {len(self.prompt)}.")
        word = self._word(start, end, 1, 1)
        if not word.positions:
            raise NoMatch(f"no token stands for characters {start}:{end} ({self.prompt[start:end]!r}) of the prompt.")
        return word

    def all(self) -> list[WordSpan]:
        """Every word of the prompt that an encoder sees, in order; punctuation is left out."""
        spans = _word_spans(self.prompt)
        total = Counter(self.prompt[start:end].lower() for start, end in spans)
        unseen = max((stream.seen for stream in self.streams.values()), default=0)
        sofar: Counter[str] = Counter()
        words = []
        for start, end in spans:
            if start >= unseen:
                break
            key = self.prompt[start:end].lower()
            sofar[key] += 1
            words.append(self._word(start, end, sofar[key], total[key]))
        return [word for word in words if word.positions]

    def special(self) -> dict[str, WordSpan]:
        """The special tokens there are: "<start>" (CLIP only), "<end>" and, where the prompt is short, "<pad>"."""
        found = {name: self._special(name) for name in SPECIAL}
        return {name: word for name, word in found.items() if word.positions}

    def tokens(self) -> dict[str, tuple[int, ...]]:
        """Positions of all real tokens per stream, special ones left out."""
        return {name: stream.places for name, stream in self.streams.items()}

    def dropped(self) -> dict[str, str]:
        """Per stream, the end of the prompt that its encoder does not see; only streams that drop something."""
        rest = {name: self.prompt[stream.seen :].strip() for name, stream in self.streams.items()}
        return {name: text for name, text in rest.items() if text}

    # -- as plain data -------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; :meth:`from_json` is the way back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Reading:
        """What :meth:`to_json` gave. Raises KeyError or TypeError for anything else."""
        streams = {
            name: StreamReading(
                first=int(given["first"]),
                spans=tuple((int(a), int(b)) for a, b in given["spans"]),
                special={key: tuple(map(int, given["special"][key])) for key in SPECIAL},
                seen=int(given["seen"]),
                length=int(given["length"]),
                at=tuple(map(int, given.get("at", ()))),
            )
            for name, given in data["streams"].items()
        }
        return cls(str(data["prompt"]), streams)

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _word(self, start: int, end: int, occurrence: int, of: int) -> WordSpan:
        tokens = {
            name: tuple(at for at, (a, b) in zip(stream.places, stream.spans, strict=True) if a < end and b > start)
            for name, stream in self.streams.items()
        }
        return WordSpan(self.prompt[start:end], start, end, occurrence, of, tokens)

    def _special(self, name: str) -> WordSpan:
        return WordSpan(name, -1, -1, 1, 1, {key: stream.special[name] for key, stream in self.streams.items()})

    def _warn_if_cut(self, word: WordSpan) -> None:
        for name, stream in self.streams.items():
            if word.start < stream.seen < word.end:
                warnings.warn(
                    f"the {name} text encoder sees only {self.prompt[word.start : stream.seen]!r} of {word.text!r}.",
                    TruncatedPrompt,
                    stacklevel=3,
                )

    def _lengths(self) -> str:
        lengths = [f"{name}: {stream.length} tokens" for name, stream in self.streams.items()]
        return ", ".join(lengths) or "no text encoder"

    def _unknown(self, phrase: str) -> NoMatch:
        there = list(dict.fromkeys(self.prompt[start:end] for start, end in _word_spans(self.prompt)))
        close = nearest(phrase, there) or [c for part in phrase.split() for c in nearest(part, there, n=1)]
        hint = f" Did you mean {' or '.join(map(repr, dict.fromkeys(close)))}?" if close else ""
        listing = ", ".join(there[:30]) + (", ..." if len(there) > 30 else "")
        return NoMatch(f"{phrase!r} is not in the prompt.{hint} Its words: {listing or 'none'}.")

    def _split_number(self, phrase: str, occurrence: int | None) -> tuple[str, int | None]:
        phrase = phrase.strip() if isinstance(phrase, str) else phrase
        if not isinstance(phrase, str) or not phrase:
            raise BadInput(f"a word or phrase of the prompt is expected, not {phrase!r}.")
        numbered = re.fullmatch(r"(.+)#(\d+)", phrase, re.DOTALL)
        if numbered and occurrence is None and not _occurrences(self.prompt, phrase):
            phrase, occurrence = numbered[1].strip(), int(numbered[2])
        if occurrence is not None and (isinstance(occurrence, bool) or occurrence < 1):
            raise BadInput(f"occurrence={occurrence!r} of {phrase!r}: occurrences count from 1.")
        return phrase, occurrence


class Words:
    """Finds words in prompts. ``model`` is a :class:`~sfumato.models.Model`, or the list of its text streams.

    The methods are those of :class:`Reading`, with the prompt in front. Raises NotSupported for tokenizers that do not
    report character offsets.
    """

    def __init__(self, model: Any):
        self.streams = list(getattr(model, "tokenizers", model))
        for stream in self.streams:
            if not stream.tokenizer.is_fast:
                raise NotSupported(
                    f"tokenizer {type(stream.tokenizer).__name__} ({stream.name}) reports no character offsets; "
                    f"load its fast version."
                )
        self._readings: dict[str, Reading] = {}
        #: Prompts in whose place a system has put texts of its own on the text axis, and where their words lie now.
        self.relaid: dict[str, Reading] = {}

    def read(self, prompt: str) -> Reading:
        """The prompt as the text encoders read it, or as it was laid out anew."""
        if prompt in self.relaid:
            return self.relaid[prompt]
        if prompt not in self._readings:
            if len(self._readings) > 256:
                self._readings.clear()
            streams = self.streams
            if any(stream.window and not stream.chunks for stream in streams):
                streams = laid_out(streams, needed(streams, [prompt]))
            self._readings[prompt] = Reading(prompt, {stream.name: read_stream(stream, prompt) for stream in streams})
        return self._readings[prompt]

    def find(self, prompt: str, phrase: str, occurrence: int | None = None) -> list[WordSpan]:
        """See :meth:`Reading.find`."""
        return self.read(prompt).find(phrase, occurrence)

    def one(self, prompt: str, phrase: str, occurrence: int | None = None) -> WordSpan:
        """See :meth:`Reading.one`."""
        return self.read(prompt).one(phrase, occurrence)

    def span(self, prompt: str, start: int, end: int) -> WordSpan:
        """See :meth:`Reading.span`."""
        return self.read(prompt).span(start, end)

    def all(self, prompt: str) -> list[WordSpan]:
        """See :meth:`Reading.all`."""
        return self.read(prompt).all()

    def special(self, prompt: str) -> dict[str, WordSpan]:
        """See :meth:`Reading.special`."""
        return self.read(prompt).special()

    def tokens(self, prompt: str) -> dict[str, tuple[int, ...]]:
        """See :meth:`Reading.tokens`."""
        return self.read(prompt).tokens()

    def dropped(self, prompt: str) -> dict[str, str]:
        """See :meth:`Reading.dropped`."""
        return self.read(prompt).dropped()


def find_phrases(readings: Sequence[Reading], phrases: Sequence[str]) -> list[list[WordSpan]]:
    """Per prompt, every occurrence of those of ``phrases`` that it has, each once. Raises NoMatch, worded for the first
    prompt, for a phrase that no prompt has."""
    found: list[dict[tuple[int, int, str], WordSpan]] = [{} for _ in readings]
    for phrase in phrases:
        complaint: NoMatch | None = None
        known = False
        for spans, reading in zip(found, readings, strict=True):
            try:
                spans.update({(span.start, span.end, span.text): span for span in reading.find(phrase)})
                known = True
            except NoMatch as error:
                complaint = complaint or error
        if complaint is not None and not known:
            raise complaint
    return [list(spans.values()) for spans in found]


def _occurrences(prompt: str, phrase: str) -> list[tuple[int, int]]:
    """Where a phrase stands in the prompt as whole words, in any case, with any blanks, accents composed or not."""
    parts = []
    for part in phrase.split():
        forms = dict.fromkeys([part, unicodedata.normalize("NFC", part), unicodedata.normalize("NFD", part)])
        parts.append("(?:" + "|".join(map(re.escape, forms)) + ")")
    spans = [match.span() for match in re.finditer(r"\s+".join(parts), prompt, re.IGNORECASE)]
    return [(a, b) for a, b in spans if not (_joined(prompt, a) or _joined(prompt, b))]


def _joined(prompt: str, i: int) -> bool:
    """Whether the characters before and at ``i`` belong to one word."""
    if not 0 < i < len(prompt) or not (_lettered(prompt[i - 1]) and _lettered(prompt[i])):
        return False
    return not (_UNSPACED.match(prompt[i - 1]) or _UNSPACED.match(prompt[i]))


def _lettered(char: str) -> bool:
    """Letters, digits, the accents that combine with them and the joiner inside composed emoji."""
    return char.isalnum() or char in "_\u200d" or unicodedata.category(char)[0] == "M"


def _word_spans(prompt: str) -> list[tuple[int, int]]:
    """Words, added tokens and pictures such as emoji, in order, without punctuation around them."""
    spans = []
    for run in _RUN.finditer(prompt):
        if run[1]:
            spans.append(run.span())
            continue
        start = None
        for i in range(run.start(), run.end() + 1):
            inside = i < run.end() and (_in_word(prompt[i]) or (start is not None and _binds(prompt, i, run.end())))
            if inside and start is None:
                start = i
            elif not inside and start is not None:
                spans.append((start, i))
                start = None
    return spans


def _in_word(char: str) -> bool:
    return _lettered(char) or unicodedata.category(char) in ("So", "Sk")


def _binds(prompt: str, i: int, end: int) -> bool:
    """An apostrophe or hyphen between letters."""
    return prompt[i] in "'\u2019-" and i + 1 < end and _lettered(prompt[i + 1])
