"""What a result depends on: the code that made it, and the supervision that its models had."""

from __future__ import annotations

import ast
import builtins
import hashlib
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = {"claims": ROOT / "claims", "sfumato": ROOT / "src" / "sfumato"}

SUPERVISION = Path(__file__).with_name("supervision.json")
"""Terms of the recipes' losses that use what only a toybox knows, and what they mean for a claim. Data, since every
claim depends on this file and none on the words."""

PROSE = {"title", "authors", "summary", "description", "cost", "defaults_from", "not_reproduced"}
"""Arguments of cards and of parameters' fields that are read by people only."""


class _Bare(ast.NodeTransformer):
    """Leaves out what no figure can depend on: docstrings, the prose of cards, what errors say."""

    def visit(self, node: ast.AST) -> ast.AST:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(getattr(first, "value", None), ast.Constant):
                node.body = node.body[1:] or [ast.Pass()]
        return super().visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        called = node.func.id if isinstance(node.func, ast.Name) else ""
        if called in _errors():
            return ast.Call(node.func, [], [])
        if called in ("Card", "Field"):
            node.keywords = [each for each in node.keywords if each.arg not in PROSE]
        return self.generic_visit(node)


@cache
def _errors() -> frozenset[str]:
    """Names of the library's errors and of Python's own."""
    own = ast.parse((ROOMS["sfumato"] / "errors.py").read_text(encoding="utf-8"))
    python = [name for name, each in vars(builtins).items() if isinstance(each, type) and issubclass(each, Exception)]
    return frozenset([*python, *(node.name for node in own.body if isinstance(node, ast.ClassDef))])


@cache
def code_hash(path: str) -> str:
    """Of a file's code; comments, docstrings, layout, the prose of cards and the words of errors do not count."""
    tree = _Bare().visit(ast.parse(Path(path).read_text(encoding="utf-8")))
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def _file(name: str) -> Path | None:
    """The file of a module of this repository, if it is one."""
    room, *rest = name.split(".")
    if room not in ROOMS:
        return None
    place = ROOMS[room].joinpath(*rest)
    return next((each for each in (place.with_suffix(".py"), place / "__init__.py") if each.is_file()), None)


def _module(path: Path) -> str:
    for room, place in ROOMS.items():
        if path.is_relative_to(place):
            parts = [room, *path.relative_to(place).with_suffix("").parts]
            return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return ""


def imported(package: str, nodes: Iterable[ast.AST]) -> list[tuple[str, str]]:
    """What import statements among the ``nodes`` of a file of ``package`` bring in: (full name, where from)."""
    found = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base += [node.module] if node.module else []
            found += [(".".join([*base, alias.name]), ".".join(base)) for alias in node.names]
    return found


@cache
def _tree(path: Path) -> tuple[list[ast.AST], list[ast.AST]]:
    """The nodes of a file that run, and those within ``if TYPE_CHECKING``, which do not."""
    runs, others = [], []
    left: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while left:
        node = left.pop()
        runs.append(node)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            others += [each for part in node.body for each in ast.walk(part)]
            left += node.orelse
        else:
            left += ast.iter_child_nodes(node)
    return runs, others


def _home(name: str, base: str) -> str:
    """The full name of what ``from base import ...`` brings in where it is defined: a face that imports on first use
    says so within ``if TYPE_CHECKING``."""
    face = _file(base) if base and not _file(name) else None
    if face is not None and face.name == "__init__.py":
        for full, module in imported(base, _tree(face)[1]):
            if full.rpartition(".")[2] == name.rpartition(".")[2]:
                return _home(full, module)
    return base if face is not None else name


@cache
def _imports(path: Path) -> frozenset[Path]:
    """Files of this repository that one imports, at its top or inside its functions, with the rooms they lie in
    (not the face of the library, which every import passes and nothing measured depends on)."""
    module = _module(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = imported(package, _tree(path)[0])
    names = {_home(name, base) for name, base in found if not name.endswith(".__version__")}
    names |= {".".join(name.split(".")[:k]) for name in names for k in range(2, name.count(".") + 1)}
    return frozenset(file for name in names if (file := _file(name)) is not None and file != path)


def dependencies(start: Path, also: Iterable[Path] = ()) -> list[Path]:
    """The file ``start``, those it imports, those they import, and so on; sorted. Files of systems that a claim knows
    by their key only are named in ``also``."""
    found, left = set(), [start, *also]
    while left:
        path = left.pop()
        if path not in found:
            found.add(path)
            left.extend(_imports(path))
    return sorted(found)


def system_files(key: str) -> list[Path]:
    """The file or files of the system of this key, if there is one."""
    source = ROOMS["sfumato"]
    return [*source.glob(f"*/{key}.py"), *source.glob(f"*/{key}/**/*.py")]


def code_fingerprint(start: Path, key: str) -> str:
    """Changes when any code that a claim's result depends on changes."""
    digest = hashlib.sha256()
    for path in dependencies(start, system_files(key)):
        digest.update(path.name.encode() if path == start else _module(path).encode())
        digest.update(code_hash(str(path)).encode())
    return digest.hexdigest()[:16]


def supervision(folders: Iterable[Path]) -> str:
    """What the models in these folders were taught that models of real pictures are not, in words; from their cards."""
    said, known = [], json.loads(SUPERVISION.read_text(encoding="utf-8"))
    for folder in folders:
        card = folder / "sfumato.json"
        if card.is_file():
            loss = json.loads(card.read_text(encoding="utf-8")).get("recipe", {}).get("loss", {})
            terms = [f"{name} {loss[name]:g} ({why})" for name, why in known.items() if loss.get(name)]
            if terms:
                said.append(f"{folder.name}: {', '.join(terms)}")
    return "; ".join(said)
