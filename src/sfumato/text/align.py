"""How the tokens of two prompts stand for each other, so that attention paid to one prompt can be given to the other.

Hertz et al. 2022 (arXiv 2208.01626), section 3: an edited map is made of columns of the source prompt's map. Which
column goes where is a matrix (source token, target token), built here on the text axis of attention:

- *replace* (the same number of words): words stand for each other one by one. A word of m tokens stands for one of n
  tokens element by element where m = n; otherwise each of the n receives 1/n of what the m had together.
- *refine* (words added or taken away): tokens are aligned by Needleman and Wunsch's global alignment of their ids with
  match 1, mismatch -1 and gap 0, as the original does; tokens without partner keep attention of their own.

Behind the last word both go on side by side: the end stands for the end, the k-th filling token for the k-th. (The
original's replacement goes on by absolute position there, so that ends and fillings are shifted when token counts
differ.) With *replace* nothing that the source attended to is lost: every row of the matrix sums to 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.markup import described
from sfumato.text.words import Reading, StreamReading, Words, token_ids

__all__ = ["Alignment", "align", "best_mode", "equaliser", "gate", "global_alignment"]

Mode = Literal["replace", "refine"]


@dataclass(frozen=True, eq=False)
class Alignment:
    """``matrix`` (s t): column j says how much of each source token's attention target token j receives; ``taken`` (t):
    1 where a target token has a counterpart at all, 0 where it keeps its own attention."""

    matrix: Tensor
    taken: Tensor

    __repr__ = described

    @property
    def identity(self) -> bool:
        """Whether every token stands for itself."""
        return bool(torch.equal(self.matrix, torch.eye(len(self.matrix)))) and bool(self.taken.all())


def best_mode(source: Reading, target: Reading) -> Mode:
    """``"replace"`` for prompts of equally many words, else ``"refine"``."""
    words = len(source.all())
    return "replace" if words and words == len(target.all()) else "refine"


def align(words: Words, source: str, target: str, mode: Mode, length: int) -> Alignment:
    """The alignment of two prompts on a text axis of ``length`` tokens.

    Every tokenizer stream aligns its own part of the axis; where two streams share one (the two CLIPs of SDXL and SD3),
    the first decides. Positions that no stream fills stand for themselves. Raises BadInput when ``mode`` is replace and
    the prompts differ in their number of words.
    """
    readings = words.read(source), words.read(target)
    matrix, taken = torch.eye(length), torch.ones(length)
    done: set[int] = set()
    for stream in words.streams:
        if stream.offset in done:
            continue
        done.add(stream.offset)
        one, other = (reading.streams[stream.name] for reading in readings)
        if (one.length, other.length) != (stream.length, stream.length):
            raise BadInput("prompts of several chunks have to be aligned within model.in_chunks, on an axis for both.")
        if mode == "replace":
            pairs = _word_groups(readings[0], readings[1], stream.name)
        else:
            partners = global_alignment(token_ids(stream, source), token_ids(stream, target))
            pairs = [([one.places[i]], [other.places[j]]) for j, i in enumerate(partners) if i is not None]
        place = slice(max(stream.offset, 0), stream.offset + stream.length)
        matrix[place, place] = 0.0
        taken[place] = 0.0
        if mode == "replace":  # words behind what an encoder reads, and more filling than the other prompt has
            end, pad = list(other.special["<end>"])[-1:], list(other.special["<pad>"])
            pairs = [(sources, targets or end) for sources, targets in pairs]
            taken[pad] = 1.0
        for sources, targets in [*pairs, *_tails(one, other, mode)]:
            _deal(matrix, taken, sources, targets)
    return Alignment(matrix, taken)


def global_alignment(source: Sequence[Any], target: Sequence[Any]) -> list[int | None]:
    """For each target token the source token that it is aligned to, or None.

    Needleman & Wunsch 1970 with match 1, mismatch -1, gap 0. A mismatch is then never better than two gaps, so the
    aligned pairs are a longest common subsequence; of equally good ones the one whose target tokens come first is
    taken.
    """
    s, t = len(source), len(target)
    best = [[0] * (t + 1) for _ in range(s + 1)]
    for i in range(1, s + 1):
        for j in range(1, t + 1):
            match = 1 if source[i - 1] == target[j - 1] else -1
            best[i][j] = max(best[i][j - 1], best[i - 1][j], best[i - 1][j - 1] + match)
    partners: list[int | None] = [None] * t
    i, j = s, t
    while i and j:
        if best[i][j] == best[i][j - 1]:
            j -= 1
        elif best[i][j] == best[i - 1][j]:
            i -= 1
        else:
            i, j = i - 1, j - 1
            partners[j] = i
    return partners


def equaliser(reading: Reading, weights: Mapping[str, float], length: int) -> Tensor:
    """Factors (t) of the target prompt's tokens: those of each word (every occurrence, unless numbered as "cube#2")
    in ``weights``, 1 elsewhere. Raises NoMatch for words that the prompt has not."""
    factors = torch.ones(length)
    for word, weight in weights.items():
        for span in reading.find(word):
            factors[list(span.positions)] = weight
    return factors


def gate(
    reading: Reading,
    window: tuple[float, float],
    words: Mapping[str, tuple[float, float]],
    length: int,
) -> Callable[[float], Tensor]:
    """The gate alpha (t) of 0 and 1 as a function of progress: open for every token while progress lies in ``window``
    [start, end), for the tokens of some ``words`` while it lies in their own. Raises NoMatch for unknown words."""
    # float64: a window that ends at 0.8 must end at step 40 of 50
    starts, ends = (torch.full((length,), edge, dtype=torch.float64) for edge in window)
    for word, (start, end) in words.items():
        for span in reading.find(word):
            starts[list(span.positions)], ends[list(span.positions)] = start, end

    def alpha(progress: float) -> Tensor:
        return ((starts <= progress) & (progress < ends)).float()

    return alpha


# --- parts ----------------------------------------------------------------------------------------------------------


def _deal(matrix: Tensor, taken: Tensor, sources: Sequence[int], targets: Sequence[int]) -> None:
    """Give the attention of some source tokens to some target tokens, in place."""
    if len(sources) == len(targets):
        matrix[list(sources), list(targets)] = 1.0
    else:
        for i in sources:
            matrix[i, list(targets)] = 1.0 / len(targets)
    if sources:
        taken[list(targets)] = 1.0


def _word_groups(source: Reading, target: Reading, stream: str) -> list[tuple[list[int], list[int]]]:
    """Token positions of the k-th word of both prompts, with the punctuation that follows it."""
    counts = [len(reading.all()) for reading in (source, target)]
    if counts[0] != counts[1] or not counts[0]:
        raise BadInput(
            f"replace needs prompts of equally many words, but {source.prompt!r} has {counts[0]} and "
            f"{target.prompt!r} has {counts[1]}; use refine."
        )
    groups = []
    for (words, marks), (others, other_marks) in zip(_groups(source, stream), _groups(target, stream), strict=True):
        if len(marks) == len(other_marks):
            groups += [(words, others), (marks, other_marks)]
        else:
            groups.append((words + marks, others + other_marks))
    return [(sources, targets) for sources, targets in groups if sources or targets]


def _groups(reading: Reading, stream: str) -> list[tuple[list[int], list[int]]]:
    """(tokens of the word, tokens between it and the next) for every word; what stands before the first word goes with
    it."""
    read, words = reading.streams[stream], reading.all()
    found: list[tuple[list[int], list[int]]] = [([], []) for _ in words]
    for place, (start, end) in zip(read.places, read.spans, strict=True):
        touched = [k for k, word in enumerate(words) if word.start < end and word.end > start]
        before = [k for k, word in enumerate(words) if word.end <= start]
        k = touched[0] if touched else before[-1] if before else 0
        found[k][0 if touched or not before else 1].append(place)
    return found


def _tails(source: StreamReading, target: StreamReading, mode: Mode) -> list[tuple[list[int], list[int]]]:
    """Start, end and filling of both: side by side."""
    pairs = []
    for name in ("<start>", "<end>"):
        pairs += [([i], [j]) for i, j in zip(source.special[name], target.special[name], strict=False)]
    ours, theirs = list(source.special["<pad>"]), list(target.special["<pad>"])
    pairs += [([i], [j]) for i, j in zip(ours, theirs, strict=False)]
    last = (theirs or list(target.special["<end>"]))[-1:]
    if mode == "replace":  # the source's further filling loses no attention, the target's gets none
        pairs += [([i], last) for i in ours[len(theirs) :]]
    return pairs
