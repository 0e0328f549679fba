"""One way into attention: the seam, its sites, running sums of maps, and the words of a prompt as token spans."""

from sfumato.attention.seam import AttentionSeam, Call, Forward, OtherMap, StopForward, Tap
from sfumato.attention.sites import Site, Where, find_sites
from sfumato.attention.words import NounPhrase, Reading, Words, WordSpan, noun_phrases

__all__ = [
    "AttentionSeam",
    "Call",
    "Forward",
    "NounPhrase",
    "OtherMap",
    "Reading",
    "Site",
    "StopForward",
    "Tap",
    "Where",
    "WordSpan",
    "Words",
    "find_sites",
    "noun_phrases",
]
