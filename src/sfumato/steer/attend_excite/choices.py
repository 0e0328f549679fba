"""What is looked at: the words that must appear, and the attention sites that are read."""

from __future__ import annotations

from collections.abc import Sequence

from sfumato.attention.sites import Site, matches_place
from sfumato.errors import BadInput, NoMatch, NotSupported
from sfumato.models.families import families_with
from sfumato.text.phrases import noun_phrases
from sfumato.text.words import Reading, WordSpan, find_phrases

#: The original reads 16x16 maps of 64x64 latents; below 8x8 a map can no longer tell two things apart.
COARSER, FEWEST = 4, 8


def subjects_of(readings: Sequence[Reading], words: Sequence[str]) -> list[list[WordSpan]]:
    """The words of every prompt that must appear: ``words``, or the heads of its noun phrases. Raises NoMatch
    where there are none."""
    subjects = find_phrases(readings, words) if words else [nouns(reading) for reading in readings]
    for reading, spans in zip(readings, subjects, strict=True):
        if any(span.start < 0 for span in spans):
            raise BadInput(f"words={list(words)} of attend_excite: special tokens are no things to be drawn.")
        if not spans:
            there = ", ".join(span.label for span in reading.all())
            lacks = f"none of {list(words)}" if words else "no noun that is recognised"
            raise NoMatch(
                f"attend_excite: the prompt {reading.prompt!r} has {lacks}; name words of it. Its words: {there}."
            )
    return subjects


def nouns(reading: Reading) -> list[WordSpan]:
    """The heads of the prompt's noun phrases that an encoder sees."""
    spans = []
    for phrase in noun_phrases(reading.prompt):
        matches = [span for span in reading.all() if span.start <= phrase.head.start < span.end]
        spans += [span for span in matches if span not in spans]
    return spans


def sites_of(sites: Sequence[Site], layers: Sequence[str], resolution: int | None, model: str) -> list[Site]:
    """Sites that see text, of one grid (h w): that whose shorter side is ``resolution``; None: a quarter of the finest,
    if that is at least 8. Raises NoMatch, NotSupported."""
    candidates = [s for s in sites if s.kind in ("cross", "joint") and s.text is not None and s.grid is not None]
    if not candidates:
        raise NotSupported(
            f"attend_excite needs attention from picture to text, and {model} has none; "
            f"{families_with('text_attention')}."
        )
    chosen = [site for site in candidates if not layers or matches_place(site, layers)]
    if not chosen:
        places = ", ".join(dict.fromkeys(site.block for site in candidates))
        raise NoMatch(f"layers={list(layers)} of attend_excite match none of {model}'s: {places}.")
    grids = sorted({site.grid for site in chosen if site.grid is not None}, reverse=True)
    if resolution is None:
        finest = max(site.grid[0] for site in sites if site.grid is not None)
        fine = [grid for grid in grids if min(grid) >= FEWEST and grid[0] * COARSER >= finest]
        wanted = fine[-1] if fine else grids[0]
    else:
        fits = [grid for grid in grids if min(grid) == resolution]
        if not fits:
            sides = ", ".join(str(min(grid)) for grid in grids)
            raise NoMatch(f"resolution={resolution} of attend_excite: at this size {model} attends to text at {sides}.")
        wanted = fits[0]
    return [site for site in chosen if site.grid == wanted]
