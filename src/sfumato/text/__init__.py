"""The text of prompts: words as token spans, noun phrases, weights, and the alignment of two prompts."""

from sfumato.text.words import NounPhrase, Reading, Words, WordSpan, noun_phrases

__all__ = ["NounPhrase", "Reading", "WordSpan", "Words", "noun_phrases"]
