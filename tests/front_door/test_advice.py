"""Every advice in the sources is sound: what it names is there, and what a reader could type is tried by a test."""

from __future__ import annotations

import ast
import functools
import importlib
import re

import pytest
import tomllib

from sfumato import registry
from sfumato.app.cli.commands import COMMANDS, loaded
from tests.front_door import advice, remedies
from tests.front_door.remedies_elsewhere import ELSEWHERE, OUT_OF_REACH

TABLES = ("", "_of_systems", "_of_commands", "_of_the_library", "_of_files")


def tried() -> set[str]:
    """Fragments of advice that tests follow."""
    found = set(ELSEWHERE)
    for name in TABLES:
        found |= set(importlib.import_module(f"tests.front_door.test_remedies{name}").TABLE)
    return found | set(remedies.FOLLOWED)


@functools.cache
def pieces(text: str) -> tuple[str, list[str], list[str]]:
    """A text of the sources in one line; what lies between its holes, bare and as it stands."""
    text = re.sub(r"\s+", " ", text)
    between = text.split(advice.HOLE)
    return text, [bare for part in between if len(bare := part.strip(" .;'")) >= 10], between


def covers(fragment: str, text: str) -> bool:
    """Whether a fragment of a message is of this text of the sources; what is filled in may lie inside of it."""
    text, parts, between = pieces(text)
    if fragment in text or any(part in fragment for part in parts):
        return True
    if (head := fragment[:12]) not in text:
        return False
    heads = tuple(fragment[:n] for n in range(12, len(fragment)))
    return any(part.endswith(heads) for part in between if head in part)


def test_every_advice_that_can_be_typed_is_tried() -> None:
    known = [*tried(), *OUT_OF_REACH]
    missing = [
        f"{each.file}:{each.line}: {each.text}"
        for each in advice.errors()
        if each.concrete and not any(covers(fragment, each.text) for fragment in known)
    ]
    assert not missing, f"{len(missing)} advices have no case:\n" + "\n".join(missing)


def test_no_case_is_stale() -> None:
    texts = {each.text for each in advice.texts() if " " in each.text}
    whole = "\0".join(pieces(text)[0] for text in texts)
    rest = [part for part in {*tried(), *OUT_OF_REACH} if part not in whole]
    assert not [part for part in rest if not any(covers(part, text) for text in texts)]


@pytest.mark.parametrize("place", sorted(set(ELSEWHERE.values())))
def test_cases_elsewhere_are_there(place: str) -> None:
    file, _, name = place.partition("::")
    assert f"def {name}(" in (advice.SOURCES.parents[1] / file).read_text(encoding="utf-8")


# --- what is named is there ------------------------------------------------------------------------------------------

#: files whose own programs have these options
PROGRAMS = {"training/__main__.py"}
#: docstrings that show several commands in a row
DOCTESTS = {"edit/net2net/__init__.py"}
#: commands of other programs
FOREIGN = re.compile(r"hf download .*|hf auth login|git lfs pull|ulimit -n 1024|accelerate launch --cpu")
#: settings of diffusers' schedulers, and words of examples
SETTINGS = {"rescale_betas_zero_snr", "word", "red", "ball", "cone", "snow", "class", "weights_only"}


def flags() -> dict[str, set[str]]:
    """Command -> its options."""
    found = {}
    for name in COMMANDS:
        command = loaded(name)
        parts = getattr(command, "commands", None) or {}
        for key, each in {name: command, **{f"{name} {sub}": one for sub, one in parts.items()}}.items():
            own = [one for one in each.params if one.param_type_name == "option"]
            found[key] = {flag for one in own for flag in (*one.opts, *one.secondary_opts)} | {"--help", "--debug"}
    return found


def test_every_option_in_a_text_is_one_of_a_command() -> None:
    known, wrong = flags(), []
    everywhere = {flag for options in known.values() for flag in options} | {"--version"}
    for each in advice.texts():
        text = FOREIGN.sub("", each.text)
        named = (
            set(re.findall(r"(?<![\w-])--[a-z]+(?:-[a-z]+)*(?![\w-])", text)) if each.file not in PROGRAMS else set()
        )
        wrong += [f"{each.file}:{each.line}: {flag}" for flag in named - everywhere]
        for command, rest in re.findall(r"\bsfumato ([a-z]+)([^;|`]*)", text):
            given = set(re.findall(r"(?<![\w-])--[a-z]+(?:-[a-z]+)*(?![\w-])", rest))
            if command in known and not known[command] >= given and each.file not in DOCTESTS:
                wrong.append(f"{each.file}:{each.line}: {command} has no {given - known[command]}")
    assert not wrong


def test_every_command_in_a_text_is_there() -> None:
    told = r"(?:`|: |such as |see |with |by )sfumato ([a-z]+)\b"
    found = [(each, name) for each in advice.texts() for name in re.findall(told, each.text)]
    assert len(found) > 20
    assert not [f"{each.file}:{each.line}: {name}" for each, name in found if name not in COMMANDS]


def test_every_parameter_in_an_advice_is_there() -> None:
    names = set(advice.known()) | advice.COMMON | SETTINGS
    for tree in advice.trees().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                names |= {each.arg for each in (*node.args.args, *node.args.kwonlyargs)}
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(node.target.id)
    wrong = []
    for each in advice.errors():
        given = re.findall(r"(?<![\w./:<-])([a-z_]\w*)=(?!=)", each.advice)
        wrong += [f"{each.file}:{each.line}: {name}=" for name in given if name not in names]
    assert not wrong


def test_every_extra_and_built_in_model_in_a_text_is_there() -> None:
    project = tomllib.loads((advice.SOURCES.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    known = set(project["project"]["optional-dependencies"]) | set(registry.names())
    known |= {path.stem for path in (advice.SOURCES / "zoo/recipes").glob("*.toml")}
    wrong = []
    for each in advice.errors():
        given = re.findall(r"sfumato\[(\w+)\]|\b(toy-[a-z0-9-]*[a-z0-9])\b", each.advice)
        wrong += [f"{each.file}:{each.line}: {name}" for name in map("".join, given) if name not in known]
    assert not wrong
