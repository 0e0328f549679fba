"""The text of ``--with``: a key and its parameters."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator

from sfumato.errors import BadInput
from sfumato.valid import brief

WITH_GRAMMAR = "KEY:name=value,name=value - lists as [red cube|ball], quotes around anything with , | [ ] or quotes"


def _one_gap(template: str) -> str:
    if template.count("{}") != 1 or set(template.replace("{}", "")) & set("{}"):
        raise ValueError("it must hold {} once, where the words go, and no other braces")
    return template


Template = Annotated[str, AfterValidator(_one_gap)]
"""A sentence with one gap, written ``{}``: what ``str.format`` fills with a text."""


def parse_with(text: str) -> tuple[str, dict[str, Any]]:
    """Read one ``--with`` argument into a key and its parameters.

    ::

        with   := key [ ":" [ param ("," param)* ] ]
        param  := name "=" value
        value  := item ( "|" item )*          one item: a value; several: a list
        item   := "[" [ value ] "]"           always a list, possibly empty; lists may hold lists
                | quoted | bare
        quoted := '"' ... '"' | "'" ... "'"   backslash escapes the next character
        bare   := characters other than , | [ ] " '   with the blanks at its ends dropped; none (unquoted) is None

    ``daam:words=[red cube|ball],heads=[0|3]`` gives ``("daam", {"words": ["red cube", "ball"], "heads": ["0", "3"]})``.
    Values stay text: the system's :class:`Params` turn them into numbers, switches and words.
    """
    key, colon, rest = text.partition(":")
    key = key.strip()
    if not key:
        raise BadInput(f"{brief(text)}: the name of a system is missing. Write {WITH_GRAMMAR}.")
    if not rest.strip():
        return key, {}
    return key, _WithReader(text, rest).params()


class _WithReader:
    """A reader over the parameters of one ``--with`` argument; ``at`` is the next character to read."""

    def __init__(self, whole: str, text: str):
        self.whole, self.text, self.at, self.depth = whole, text, 0, 0

    def params(self) -> dict[str, Any]:
        given: dict[str, Any] = {}
        while True:
            name = self._until("=,|[]\"'").strip()
            if not name or self._peek() != "=":
                raise self._bad(f"expected name=value at {self.text[self.at - len(name) :][:20]!r}")
            if name in given:
                raise self._bad(f"{name} is given twice")
            self.at += 1
            given[name] = self._value(stop=",")
            if self.at == len(self.text):
                return given
            self.at += 1

    def _value(self, stop: str) -> Any:
        items = self._items()
        if self._peek() != stop and self._peek():
            raise self._bad(f"expected {stop!r} but found {self._peek()!r}")
        return items[0] if len(items) == 1 else items

    def _items(self) -> list[Any]:
        items = [self._item()]
        while self._peek() == "|":
            self.at += 1
            items.append(self._item())
        return items

    def _item(self) -> Any:
        self._skip_blanks()
        first = self._peek()
        if first == "[":
            return self._list()
        if first and first in "'\"":
            return self._quoted(first)
        bare = self._until(",|[]\"'").strip()
        if not bare:
            raise self._bad("a value is missing")
        return None if bare.lower() == "none" else bare

    def _list(self) -> list[Any]:
        start = self.at
        self.at += 1
        self.depth += 1
        if self.depth > 4:
            raise self._bad("lists are nested deeper than 4")
        self._skip_blanks()
        items = [] if self._peek() == "]" else self._items()
        if self._peek() != "]":
            found = f"found {self._peek()!r} (items are parted by |)" if self._peek() else "ends without"
            raise self._bad(f"the list {brief(self.text[start:], 24)} needs ']' but {found}")
        self.at += 1
        self.depth -= 1
        self._skip_blanks()
        return items

    def _quoted(self, quote: str) -> str:
        self.at += 1
        out = []
        while (char := self._peek()) != quote:
            if not char:
                raise self._bad(f"the quote {quote} is never closed")
            if char == "\\" and self.at + 1 < len(self.text):
                self.at += 1
                char = self.text[self.at]
            out.append(char)
            self.at += 1
        self.at += 1
        self._skip_blanks()
        return "".join(out)

    def _peek(self) -> str:
        return self.text[self.at] if self.at < len(self.text) else ""

    def _until(self, stops: str) -> str:
        start = self.at
        while self.at < len(self.text) and self.text[self.at] not in stops:
            self.at += 1
        return self.text[start : self.at]

    def _skip_blanks(self) -> None:
        while self._peek() == " ":
            self.at += 1

    def _bad(self, what: str) -> BadInput:
        return BadInput(f"{brief(self.whole)}: {what}. Write {WITH_GRAMMAR}.")
