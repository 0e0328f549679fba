"""What the sources tell a user: every text in them, and every advice that an error gives."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SOURCES = Path(__file__).parents[2] / "src/sfumato"
HOLE = "{}"
_VERBS = (
    "add|ask|attach|begin|call|change|check|choose|clone|close|compare|compute|connect|convert|cut|disable|draw|drop|"
    "fetch|fit|free|get|give|go on|install|join|leave|load|log in|lower|make|merge|move|name|pass|put|raise|record|"
    "remove|repeat|resize|restore|run|save|say|see|set|shorten|spread|take|teach|train|try|use|wait|widen|write"
)
#: where a text turns to its reader: a verb at the head of a clause
_TURNS = re.compile(rf"(?:[;:,.(] |, or |, and |\bor |^)(?:please |then |so )?(?:{_VERBS})\b", re.I)
#: what a reader could type: an option, a parameter, a call, a command, a value in quotes, or what is filled in
_TYPED = re.compile(rf"--?[a-z]|\b\w+=|`|\w\(|'[^' ]+'|\bsfumato |\.safetensors|\bleave\b|{re.escape(HOLE)}")


@cache
def known() -> frozenset[str]:
    """Names that mean something to sfumato: parameters of systems and options, schedulers."""
    from sfumato import cards
    from sfumato.models.schedulers import _TABLES
    from sfumato.sampling import Options

    names = {each.name for key in cards.methods() for each in cards.parameters(key)} | set(Options.model_fields)
    names |= {name for table in _TABLES.values() for name in table}
    return frozenset(names - COMMON)


#: parameters that are plain words as well
COMMON = {"words", "word", "prompt", "prompts", "name", "image", "images", "size", "steps", "mask", "n", "at", "map"}
COMMON |= {
    "source",
    "texts",
    "seed",
    "seeds",
    "pairs",
    "models",
    "layer",
    "layers",
    "model",
    "window",
    "concept",
    "soft",
}
COMMON |= {
    "text",
    "batch",
    "first",
    "box",
    "clip",
    "phrases",
    "levels",
    "level",
    "through",
    "begin",
    "enough",
    "frames",
}
COMMON |= {"attention", "share", "grow", "strength", "direction", "directions", "colors", "decay", "target", "shares"}


@dataclass(frozen=True)
class Text:
    """A text of the sources; what is filled in is ``{}``."""

    file: str
    line: int
    text: str

    @property
    def advice(self) -> str:
        """From where it turns to its reader; empty where it does not."""
        found = _TURNS.search(self.text)
        return self.text[found.start() :].lstrip(";:,.( ") if found else ""

    @property
    def concrete(self) -> bool:
        """Whether the advice names something that a reader could type."""
        return bool(_TYPED.search(self.advice)) or bool(known() & set(re.findall(r"\w+", self.advice)))


def _parts(node: ast.AST) -> list[str]:
    """The texts that an expression can give."""
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.JoinedStr(values=values):
            return ["".join(str(v.value) if isinstance(v, ast.Constant) else HOLE for v in values)]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return [a + b for a in _parts(left) or [HOLE] for b in _parts(right) or [HOLE]]
        case ast.IfExp(body=body, orelse=orelse):
            return [*_parts(body), *_parts(orelse)]
    return []


@cache
def trees() -> dict[str, ast.Module]:
    return {
        str(path.relative_to(SOURCES)): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(SOURCES.rglob("*.py"))
    }


@cache
def texts() -> tuple[Text, ...]:
    return tuple(_texts())


def _texts() -> Iterator[Text]:
    """Every text, docstrings and the names in ``__all__`` included."""
    for file, tree in trees().items():
        inside = {id(v) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for v in ast.walk(node)} - {
            id(node) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant | ast.JoinedStr) and id(node) not in inside:
                for text in _parts(node):
                    yield Text(file, node.lineno, text)


@cache
def errors() -> tuple[Text, ...]:
    return tuple(_errors())


def _errors() -> Iterator[Text]:
    """The texts of errors that are raised on purpose."""
    for file, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                for argument in node.exc.args:
                    for text in _parts(argument):
                        if " " in text:
                            yield Text(file, node.lineno, text)
