"""Values by word, as recipes and the command line hold them (``ball=1.5``, ``ball=0.2-0.6``), and windows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from sfumato.errors import BadInput, NoMatch
from sfumato.text.words import Reading

Window = tuple[float, float]


def window_of(given: Sequence[float]) -> Window:
    """(start, end) from one number, the end, or from both; empty where they are equal. Raises ValueError."""
    start, end = (0.0, given[0]) if len(given) == 1 else tuple(given)
    if not 0 <= start <= end <= 1:
        raise ValueError("a window is its end, or its start and end, as fractions of progress from 0 to 1")
    return start, end


def as_texts(given: Any, form: str) -> Any:
    """A mapping of words as texts ``word=value``; anything else as it is."""
    if not isinstance(given, Mapping):
        return given
    pair = {word: isinstance(value, list | tuple) and len(value) == 2 for word, value in given.items()}
    return [f"{word}={form.format(*value) if pair[word] else value}" for word, value in given.items()]


def factors_of(given: Sequence[str]) -> dict[str, float]:
    """word -> factor. Raises ValueError."""
    found = {}
    for text in given:
        word, equals, number = text.rpartition("=")
        try:
            found[word.strip()] = float(number)
        except ValueError:
            equals = ""
        if not equals or not word.strip() or not abs(found[word.strip()]) <= 1e4:
            raise ValueError(f"{text!r} is not word=factor, such as ball=1.5")
    return found


def windows_of(given: Sequence[str]) -> dict[str, Window]:
    """word -> window. Raises ValueError."""
    found = {}
    for text in given:
        word, equals, span = text.rpartition("=")
        try:
            found[word.strip()] = window_of([float(edge) for edge in span.split("-", 1)])
        except ValueError:
            equals = ""
        if not equals or not word.strip():
            raise ValueError(f"{text!r} is not word=start-end, such as ball=0.2-0.6")
    return found


def _checked(read: Callable[[Any], Any]) -> AfterValidator:
    """A value stays as it is, but must be readable."""
    return AfterValidator(lambda given: given if read(given) is not None else given)


# types of parameters
WindowEdges = Annotated[list[float], _checked(window_of)]
Factors = Annotated[list[str], BeforeValidator(lambda given: as_texts(given, "{}")), _checked(factors_of)]
WordWindows = Annotated[list[str], BeforeValidator(lambda given: as_texts(given, "{}-{}")), _checked(windows_of)]


def has(reading: Reading, word: str) -> bool:
    """Whether a prompt has a word."""
    try:
        return bool(reading.find(word))
    except NoMatch:
        return False


def known(given: Mapping[str, Any], reading: Reading) -> dict[str, Any]:
    """Those words that a prompt has."""
    return {word: value for word, value in given.items() if has(reading, word)}


def require(word: str, readings: Sequence[Reading]) -> None:
    """Raise NoMatch, as the last prompt says it, if no prompt has this word."""
    if not any(has(reading, word) for reading in readings):
        readings[-1].find(word)


def refuse_overlaps(name: str, given: Mapping[str, Any], readings: Sequence[Reading]) -> None:
    """Raise BadInput where two phrases share a word of a prompt and have different values."""
    for reading in readings:
        spans = [(word, span) for word in known(given, reading) for span in reading.find(word)]
        for i, (one, first) in enumerate(spans):
            for other, second in spans[i + 1 :]:
                if given[one] != given[other] and first.start < second.end and second.start < first.end:
                    raise BadInput(
                        f"{name} of prompt_to_prompt gives two values at once: {one!r} and {other!r} overlap in "
                        f"{reading.prompt!r}."
                    )
