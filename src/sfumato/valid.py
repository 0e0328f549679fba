"""The one check of texts and values that people and files bring: what every encoder, file and terminal can hold.

No tokenizer, file name or JSON file takes half a surrogate pair or a zero byte, JSON knows neither not-a-number nor
infinity, and nothing that a person means is nested a thousand deep. All entrances - parameters, prompts files,
captions, recipes - ask here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from sfumato.errors import BadInput

__all__ = [
    "BadJson",
    "brief",
    "first_line",
    "json_line",
    "json_text",
    "loads",
    "parsed_json",
    "shown",
    "text",
    "texts",
    "whole",
    "wrong",
]

MOST = 1000  # items of one list
DEEPEST = 32  # lists within lists
LONGEST = 100_000  # characters of one text; embedded pictures have limits of their own
LARGEST_COUNT = 10**6  # of steps, pictures, directions ...
LARGEST_SEED = 2**62 - 1  # torch takes no more than 64 bits, and neighbours count up from it
LARGEST = 10**300  # beyond it a whole number is no float


def brief(value: Any, limit: int = 60) -> str:
    """A value as Python writes it, cut to ``limit`` characters; never raises, whatever the value."""
    try:
        written = repr(value)
    except (ValueError, RecursionError) as error:  # whole numbers of more than 4300 digits; lists that are nested deep
        return f"a value that cannot be written ({str(error)[:40]})"
    return written if len(written) <= limit else written[: limit - 3] + "..."


def shown(given: Any) -> str:
    """A text, or the name of a file, as something that any file and terminal of UTF-8 can hold."""
    return str(given).encode("utf-8", "backslashreplace").decode()


def wrong(value: Any, most: int = MOST, names: bool = False, _depth: int = 0) -> str:
    """What is wrong with a value from outside, in a few words; empty where nothing is. Lists and mappings are looked
    through; objects of other kinds (pictures, arrays) are not checked here. ``names``: texts may be names of
    files, which need not be valid text."""
    if isinstance(value, str):
        return _wrong_text(value, names)
    if isinstance(value, int):
        return "it has more than 300 digits" if abs(value) >= LARGEST else ""
    if not isinstance(value, list | tuple | dict | set | frozenset):
        return ""
    if len(value) > most:
        return f"it has {len(value)} entries; the most is {most}"
    if _depth >= DEEPEST:
        return f"it is nested deeper than {DEEPEST}"
    inner = [*value, *value.values()] if isinstance(value, dict) else value
    return next((found for each in inner if (found := wrong(each, most, names, _depth + 1))), "")


def _wrong_text(given: str, names: bool) -> str:
    if "\0" in given:
        return "it holds a zero byte"
    try:
        given.encode(errors="surrogatepass" if names else "strict")
    except UnicodeEncodeError as error:
        code = ord(given[error.start])
        return f"it is not valid text: character {error.start + 1} (U+{code:04X}) cannot be encoded"
    if len(given) > LONGEST and not given.startswith("data:"):
        return f"it has {len(given)} characters; the most is {LONGEST}"
    return ""


def first_line(error: BaseException) -> str:
    """An exception's message, cut to its first line; its kind where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def text(given: Any, what: str) -> str:
    """``given`` if it is a text that can be encoded. Raises BadInput, which names ``what``."""
    if not isinstance(given, str):
        raise BadInput(f"{what} is {brief(given)}; it must be a text.")
    if found := wrong(given):
        raise BadInput(f"{what} is {brief(given)}: {found}.")
    return given


# --- JSON ------------------------------------------------------------------------------------------------------------


class BadJson(ValueError):
    """A finding of :func:`parsed_json` itself: its text is for people, as it stands."""


def whole(given: int, what: str, least: int, most: int) -> int:
    """``given`` if it is from ``least`` to ``most``. Raises BadInput, which names ``what``."""
    if not least <= given <= most:
        raise BadInput(f"{what} is {brief(given)}; it must be from {least} to {most}.")
    return given


def texts(given: Any, argument: str) -> list[str]:
    """One text or several as a list. Raises BadInput for anything else, and for none."""
    found = [given] if isinstance(given, str) else list(given) if isinstance(given, Sequence) else [given]
    bad = [each for each in found if not isinstance(each, str)]
    if bad or not found:
        given = bad[0] if bad else found
        raise BadInput(f"{argument}={given!r} is not allowed: give a string or a non-empty list of strings.")
    return found


def loads(source: str | bytes, **how: Any) -> Any:
    """As ``json.loads``, but whatever is wrong with the text is a ValueError, also where it is nested too deep."""
    try:
        return json.loads(source, **how)
    except RecursionError:
        raise BadJson("it is nested too deep") from None


def parsed_json(source: str | bytes, names: bool = False) -> Any:
    """A JSON value. Raises ValueError, in a few words, for anything else; :class:`BadJson` for not-a-number and
    infinity, which Python's reader takes, for what is nested too deep or no UTF-8, and for texts that cannot be encoded
    - unless, with ``names``, they may be names of files, which the caller has to tell from texts."""
    try:
        value = loads(source, parse_constant=_refuse)
    except UnicodeDecodeError:
        raise BadJson("it is not UTF-8 text") from None
    if found := _not_finite(value) or wrong(value, LONGEST, names):
        raise BadJson(found)
    return value


def _refuse(name: str) -> None:
    raise BadJson(f"{name} is no JSON")


def _not_finite(value: Any, depth: int = 0) -> str:
    """Numbers such as 1e999 are JSON, but are written as Infinity, which is none."""
    if isinstance(value, float):
        return "" if math.isfinite(value) else "a number is too large"
    if not isinstance(value, list | dict) or depth > DEEPEST:
        return ""
    inner = value.values() if isinstance(value, dict) else value
    return next((found for each in inner if (found := _not_finite(each, depth + 1))), "")


def json_text(value: Any, indent: int | None = None, ascii_only: bool = False) -> str:
    """A value as JSON that any reader takes. What no UTF-8 file can hold - file names that are no text - is written as
    the escape it has in JSON, and reads back as it was. Raises ValueError for numbers that are not finite."""
    return shown(json.dumps(value, indent=indent, ensure_ascii=ascii_only, allow_nan=False))


def json_line(value: Any) -> bytes:
    """One line of a JSONL file."""
    return (json_text(value) + "\n").encode()
