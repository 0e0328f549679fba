"""A small rule-based chunker for English noun phrases: closed-class words, a few endings, no model and no download."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["NestedPhrase", "NounPhrase", "PhraseWord", "nested_phrases", "noun_phrases"]


@dataclass(frozen=True)
class PhraseWord:
    """One word at characters [``start``, ``end``)."""

    text: str
    start: int
    end: int


@dataclass(frozen=True)
class NounPhrase:
    """A flat noun phrase: ``text`` at characters [``start``, ``end``), its ``head`` noun and the words that modify it.

    Articles and other determiners belong to the text but are no modifiers.
    """

    text: str
    start: int
    end: int
    head: PhraseWord
    modifiers: tuple[PhraseWord, ...]


@dataclass(frozen=True)
class NestedPhrase:
    """A noun phrase that may hold others: ``text`` at characters [``start``, ``end``); ``parent`` is the index, in the
    list it came in, of the smallest phrase around it, None for an outermost one."""

    text: str
    start: int
    end: int
    parent: int | None


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_DETERMINERS = _words(
    "a an the this that these those some any no every each either neither another both all several many few much "
    "more most less other such what which whose my your his her its our their one two three four five six seven "
    "eight nine ten eleven twelve dozen hundred thousand"
)
_BREAKS = _words(  # prepositions, conjunctions, pronouns, auxiliaries: never inside a flat noun phrase
    "of in on at by for with without from to into onto over under above below behind beside besides between among "
    "amongst near through across along around against inside outside within during before after beyond toward "
    "towards upon off up down out about like as than per via atop beneath underneath alongside amid amidst next and "
    "or but nor yet so if while when where because though although whereas i you he she it we they me him us them "
    "who whom myself itself himself herself themselves something someone anything nothing everyone there here is "
    "are was were be been being am has have had having do does did doing done will would can could may might must "
    "shall should not also then just only too again isn't aren't wasn't weren't doesn't don't didn't it's he's "
    "she's they're there's"
)
_ADVERBS = _words("very quite really extremely slightly rather fairly highly")
_ADJECTIVES = _words(
    "red green blue yellow orange purple violet pink brown black white gray grey golden gold silver cyan magenta "
    "teal turquoise beige dark light bright pale big small large little tiny huge giant tall short long wide narrow "
    "thick thin old young new ancient modern plain striped dotted checkered spotted checked shiny matte glossy "
    "round square flat wooden metal metallic plastic stone glass wet dry hot cold warm cool soft hard smooth rough "
    "happy sad beautiful ugly pretty cute clean dirty empty full open closed fresh raw deep shallow high low fast "
    "slow loud quiet heavy strong weak"
)
_VERBS = _words(  # verbs of picture captions in the forms that no ending gives away
    "sits sit sat stands stand stood lies lie lay lays wears wear wore worn holds hold held rides ride rode walks "
    "walk runs run ran jumps jump plays play eats eat ate drinks drink drank flies fly flew looks look watches "
    "watch reads read carries carry shows show drives drive drove swims swim swam sleeps sleep slept leans lean "
    "hangs hang hung rests rest floats float grows grow grew makes make made takes take took gives give gave gets "
    "get got goes go went comes come came sees see saw says say said points faces covers contains touches chases "
    "follows catches throws kicks hits pulls pushes climbs crosses fills surrounds overlooks casts meets becomes "
    "seems appears remains stays keeps smiles"
)
_LINKS = _words(  # prepositions that hang a noun phrase on the one before it
    "of in on at by for with without from to into onto over under above below behind beside besides between among "
    "amongst near through across along around against inside outside within beyond toward towards upon off via atop "
    "beneath underneath alongside amid amidst"
)
_CLOSED = _DETERMINERS | _BREAKS | _ADVERBS | _VERBS
_POSITIONS = re.compile(  # places that look like noun phrases but only relate two others
    r"\b(?:in front of|on top of"
    r"|(?:to|on|at) the (?:very )?(?:left|right|top|bottom|front|back|side|edge|middle|center|centre)(?: side)?(?: of)?"
    r"|in the (?:middle|center|centre|background|foreground)(?: of)?"
    r"|(?:left|right) of|next to|close to|far from|instead of|because of)\b",
    re.IGNORECASE,
)
_TOKEN = re.compile(r"<[\w-]+>|\w+(?:['\u2019-]\w+)*|[^\w\s]")


def noun_phrases(text: str, parser: Callable[[str], Any] | None = None) -> list[NounPhrase]:
    """The flat noun phrases of an English text, in order: "a red cube", "two striped balls".

    A rule chunker with a closed vocabulary: good on captions, not a parser of English. ``parser`` may be a loaded spaCy
    pipeline; its ``noun_chunks`` are then used instead. A phrase of one's own needs no chunker: any stretch of the
    prompt is accepted wherever words are.
    """
    if parser is not None:
        return [_from_spacy(chunk) for chunk in parser(text).noun_chunks]
    hidden = _POSITIONS.sub(lambda match: "." * len(match.group()), text)
    tokens = [PhraseWord(match.group(), *match.span()) for match in _TOKEN.finditer(hidden)]
    phrases: list[NounPhrase] = []
    chunk: list[PhraseWord] = []
    for i, token in enumerate(tokens):
        follows = tokens[i + 1].text.lower() if i + 1 < len(tokens) else "."
        if _belongs(token.text.lower(), follows, [part.text.lower() for part in chunk]):
            if token.text.lower() in _DETERMINERS and any(_is_open(part.text) for part in chunk):
                phrases += _close(text, chunk)  # a determiner starts a new phrase: "give the dog a bone"
                chunk = []
            chunk.append(token)
        else:
            phrases += _close(text, chunk)
            chunk = []
    return phrases + _close(text, chunk)


def nested_phrases(text: str, parser: Callable[[str], Any] | None = None) -> list[NestedPhrase]:
    """All noun phrases of an English text at all depths, outer before inner, from left to right.

    On the flat ones (:func:`noun_phrases`) two rules build. A phrase that follows a preposition, a place such as "to
    the left of" or a participle hangs on the phrase before it, always the nearest: "a ball on [a cube next to [a
    cone]]". Phrases joined by "and" or "or", with commas between more than two, make one phrase together.
    """
    flat = noun_phrases(text, parser)
    groups: list[list[list[NounPhrase]]] = []  # of conjuncts, of phrases that hang on each other
    joints: list[list[str]] = []  # of each group, what stands between its conjuncts
    for i, phrase in enumerate(flat):
        link = _link(text[flat[i - 1].end : phrase.start]) if i else ""
        if link == "hangs":
            groups[-1][-1].append(phrase)
        elif link in (",", "and"):
            groups[-1].append([phrase])
            joints[-1].append(link)
        else:
            groups.append([[phrase]])
            joints.append([])
    spans: list[tuple[int, int]] = []
    for conjuncts, between in zip(groups, joints, strict=True):
        # commas alone join nothing
        joined = max((i + 2 for i, joint in enumerate(between) if joint == "and"), default=0)
        together = [conjuncts[:joined]] if joined else []
        for chains in together + [[chain] for chain in conjuncts[joined:]]:
            end = chains[-1][-1].end
            spans += [(chains[0][0].start, end)] if len(chains) > 1 else []
            for chain in chains:
                spans += [(phrase.start, chain[-1].end) for phrase in chain[:-1]]
                spans += [(phrase.start, phrase.end) for phrase in chain]
    spans.sort(key=lambda span: (span[0], -span[1]))
    found: list[NestedPhrase] = []
    for start, end in spans:
        around = [i for i, other in enumerate(found) if other.start <= start and end <= other.end]
        found.append(NestedPhrase(text[start:end], start, end, around[-1] if around else None))
    return found


def _link(between: str) -> str:
    """What the words between two flat noun phrases make of them: "hangs", "and", "," or "" (nothing)."""
    words = re.findall(r"[\w'\u2019-]+|[^\w\s]", _POSITIONS.sub(" of ", between).lower())
    if words and all(word in _LINKS or word == "," or (word.endswith("ing") and len(word) > 4) for word in words):
        return "," if set(words) == {","} else "hangs"
    return "and" if words and set(words) <= {"and", "or", ","} else ""


def _belongs(word: str, follows: str, chunk: list[str]) -> bool:
    """Whether a word continues (or opens) the noun phrase whose words so far are ``chunk``."""
    described = [w for w in chunk if _is_open(w)]
    only_adjectives = all(w in _ADJECTIVES for w in described)
    if word in (",", "and", "or"):  # "a big, red cube", "a black and white cat"
        return bool(described) and only_adjectives and (follows in _ADJECTIVES or _opens_with_adjective(follows))
    if not re.match(r"[\w<]", word) or word in _BREAKS:
        return False
    if word in _DETERMINERS:
        return True
    if word in _VERBS:
        return bool(chunk) and not described and _is_open(follows)  # "the rest area", but "a cat sits"
    if word in _ADVERBS or (word.endswith("ly") and word not in _ADJECTIVES and len(word) > 4):
        return _is_open(follows) and only_adjectives
    if (
        word.endswith("ing")
        and len(word) > 4
        and word not in ("king", "ring", "wing", "building", "painting", "ceiling")
    ):
        return bool(chunk) and only_adjectives and _is_open(follows)  # "a running dog", but "a dog running"
    if word.endswith("ed") and len(word) > 4 and word not in _ADJECTIVES:
        return only_adjectives and _is_open(follows)  # "a painted wall", but "a wall painted"
    return True


def _opens_with_adjective(word: str) -> bool:
    return word.endswith(("ed", "y", "ish", "ful", "ous")) and _is_open(word)


def _is_open(word: str) -> bool:
    """A noun, adjective or name rather than grammar."""
    word = word.lower()
    return bool(re.match(r"[\w<]", word)) and word not in _CLOSED and not (word.endswith("ly") and len(word) > 4)


def _close(text: str, chunk: list[PhraseWord]) -> list[NounPhrase]:
    """The phrase that the words of ``chunk`` make, if they make one: adjectives alone do not ("the sky is blue")."""
    while chunk and not re.match(r"[\w<]", chunk[-1].text):
        chunk = chunk[:-1]
    described = [part for part in chunk if _is_open(part.text)]
    bare = len(described) == len(chunk) and all(part.text.lower() in _ADJECTIVES for part in described)
    if not described or bare:
        return []
    start, end = chunk[0].start, chunk[-1].end
    return [NounPhrase(text[start:end], start, end, described[-1], tuple(described[:-1]))]


def _from_spacy(chunk: Any) -> NounPhrase:
    part = lambda token: PhraseWord(token.text, token.idx, token.idx + len(token.text))  # noqa: E731
    modifiers = tuple(part(token) for token in chunk if token != chunk.root and token.pos_ not in ("DET", "PUNCT"))
    return NounPhrase(chunk.text, chunk.start_char, chunk.end_char, part(chunk.root), modifiers)
