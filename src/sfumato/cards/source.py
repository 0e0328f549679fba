"""A system's parameters, read from the source text without importing it: base classes, names of types and constants are
followed from file to file of the package."""

from __future__ import annotations

import ast
import functools
from pathlib import Path
from typing import Any

from sfumato.cards.parameters import KINDS, LIMITS, REQUIRED, Parameter, meaning

__all__ = ["Unreadable", "parameters_in"]

ROOT = Path(__file__).parents[1]
TYPES = {"Literal", "tuple", "dict", "Any"}  # neither a text nor a number nor a list of them
BASE = ("sfumato.cards", "Params")


class Unreadable(ValueError):
    """What only importing would tell."""


def parameters_in(module: str) -> list[Parameter]:
    """The fields of the class ``Params`` inside the system's class in a module of the package, inherited ones first.

    Raises Unreadable where there is not one such class, or where a field is neither a literal nor a name of the package
    that leads to one."""
    classes = [node for node in _tree(module).body if isinstance(node, ast.ClassDef)]
    schemas = [
        each
        for node in classes
        for each in node.body
        if isinstance(each, ast.ClassDef) and each.name == "Params"
    ]  # fmt: skip
    if len(schemas) != 1:
        raise Unreadable(f"{module} has {len(schemas)} classes Params inside classes")
    return list(_fields(module, schemas[0]).values())


def _fields(module: str, schema: ast.ClassDef) -> dict[str, Parameter]:
    """Fields by name in pydantic's order: an overriding one stands where the inherited one stood."""
    found: dict[str, Parameter] = {}
    for base in reversed(schema.bases):
        where, node = _definition(module, base)
        if (where, getattr(node, "name", "")) == BASE:
            continue
        if not isinstance(node, ast.ClassDef):
            raise Unreadable(f"{ast.unparse(base)} of {module} is no class")
        found |= _fields(where, node)
    for node in schema.body:
        if isinstance(node, ast.AnnAssign) and "ClassVar" not in ast.unparse(node.annotation):
            found[ast.unparse(node.target)] = _parameter(module, node)
    return found


def _parameter(module: str, node: ast.AnnAssign) -> Parameter:
    if not isinstance(node.value, ast.Call):
        raise Unreadable(f"{ast.unparse(node)} is not declared with Field(...)")
    given = {str(word.arg): word.value for word in node.value.keywords}
    if node.value.args:
        given["default"] = node.value.args[0]
    facts = {
        name: _value(module, value)
        for name, value in given.items()
        if name in ("default", "description", "json_schema_extra", *LIMITS)
    }
    default = repr(facts["default"]) if "default" in facts else REQUIRED
    limits, extra = {key: facts[key] for key in LIMITS if key in facts}, facts.get("json_schema_extra", {})
    kinds = _kinds(module, node.annotation)
    kind = kinds.pop() if len(kinds) == 1 and kinds <= KINDS else "any"
    text = meaning(facts.get("description"), extra, limits)
    return Parameter(ast.unparse(node.target), kind, default, text, bool(extra.get("flag", True)))


def _value(module: str, node: ast.expr) -> Any:
    """A literal, or what a constant of the package holds."""
    if isinstance(node, ast.Name | ast.Attribute):
        where, found = _definition(module, node)
        return _value(where, _assigned(found))
    if isinstance(node, ast.List | ast.Tuple):
        values = [_value(module, each) for each in node.elts]
        return tuple(values) if isinstance(node, ast.Tuple) else values
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise Unreadable(f"{ast.unparse(node)} of {module} is no literal") from None


def _kinds(module: str, node: ast.expr) -> set[str]:
    """What a text may become, None aside: of :data:`KINDS`, or one of :data:`TYPES`."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        node = ast.parse(node.value, mode="eval").body
    if isinstance(node, ast.Constant) and node.value is None:
        return set()
    if isinstance(node, ast.BinOp):
        return _kinds(module, node.left) | _kinds(module, node.right)
    if isinstance(node, ast.Subscript):
        if ast.unparse(node.value) == "Annotated":
            assert isinstance(node.slice, ast.Tuple)
            return _kinds(module, node.slice.elts[0])
        return _kinds(module, node.value)
    if (name := ast.unparse(node)) in KINDS | TYPES:
        return {name}
    where, found = _definition(module, node)
    return {"Any"} if isinstance(found, ast.ClassDef) else _kinds(where, _assigned(found))


def _assigned(node: ast.stmt | None) -> ast.expr:
    value = getattr(node, "value", None)
    if not isinstance(value, ast.expr):
        raise Unreadable(f"{ast.unparse(node) if node else 'a module'} holds no value")
    return value


def _definition(module: str, name: ast.expr) -> tuple[str, ast.stmt | None]:
    """(module, statement) that defines a name, or a dotted one; (module, None) for a module of the package."""
    if isinstance(name, ast.Attribute):
        where, found = _definition(module, name.value)
        if found is not None:
            raise Unreadable(f"{ast.unparse(name)} of {module} is an attribute of no module")
        return _named(where, name.attr)
    if not isinstance(name, ast.Name):
        raise Unreadable(f"{ast.unparse(name)} of {module} is no name")
    return _named(module, name.id)


def _named(module: str, name: str) -> tuple[str, ast.stmt | None]:
    node = _names(module).get(name)
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        alias = next(each for each in node.names if (each.asname or each.name) == name)
        if node.module.split(".")[0] == "sfumato":
            return _named(node.module, alias.name)
    elif isinstance(node, ast.stmt):
        return module, node
    elif _file(f"{module}.{name}") is not None:
        return f"{module}.{name}", None
    raise Unreadable(f"{name} of {module} comes from elsewhere")


@functools.cache
def _names(module: str) -> dict[str, ast.stmt]:
    """The statements of a module that define or import a name."""
    found: dict[str, ast.stmt] = {}
    for node in _tree(module).body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign):
            found |= {ast.unparse(target): node for target in node.targets}
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            found[ast.unparse(node.target)] = node
        elif isinstance(node, ast.ImportFrom):
            found |= {each.asname or each.name: node for each in node.names}
    return found


@functools.cache
def _tree(module: str) -> ast.Module:
    path = _file(module)
    if path is None:
        raise Unreadable(f"there is no module {module}")
    return ast.parse(path.read_text(encoding="utf-8"))


def _file(module: str) -> Path | None:
    place = ROOT.joinpath(*module.split(".")[1:])
    return next((each for each in (place.with_suffix(".py"), place / "__init__.py") if each.is_file()), None)
