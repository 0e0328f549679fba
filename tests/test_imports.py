"""The house: rooms import from floors below only, importing is quick, and importing changes nothing global."""

from __future__ import annotations

import ast
import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

import sfumato
from claims import sources

SOURCE = Path(sfumato.__file__).parent

FLOORS = [
    {"errors", "interrupts", "locks", "startup", "version"},
    {"arrays", "sheets", "markup", "once", "rng", "windows", "dialects", "ondemand", "valid", "writing"},
    {"registry"},
    {"files", "cards", "protocol", "scale"},
    {"clips", "checkpoints"},
    {"metrics"},
    {"toybox", "mask_ops"},
    {"models", "masks"},
    {"attention", "text", "hspace"},
    {"relevance"},
    {"sampling"},
    {"adapters"},
    {"training"},
    {"translation"},
    {"zoo"},
    {"judge"},
    {"bench"},
    {"explain"},
    {"steer", "edit", "animate", "generate", "disentangle"},
    {"teach"},
    {"app"},
    {"__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}


def _room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def _module(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")


def _named(path: Path, nodes: Iterable[ast.AST]) -> set[str]:
    """The sfumato names that import statements among ``nodes`` of a file bring in, spelt in full."""
    package = _module(path) if path.name == "__init__.py" else _module(path).rpartition(".")[0]
    return {name for name, _ in sources.imported(package, nodes) if name.split(".")[0] == "sfumato"}


@functools.cache
def _imports(path: Path) -> set[str]:
    """What a file imports: at its top, inside its functions, or for annotations only."""
    return _named(path, ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


FILES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


def test_rooms_import_from_below():
    wrong = []
    for path in FILES:
        room, file = _room(path), path.relative_to(SOURCE)
        assert room in LEVEL, f"{room} has no floor yet: give it one in this test"
        for name in _imports(path):
            other = [*name.split("."), ""][1]
            assert other in LEVEL, f"{file} imports {name}, which has no floor"
            if other != room and not LEVEL[other] < LEVEL[room]:
                wrong.append(f"{file} imports {name}, which is not on a floor below {room}")
    assert not wrong, "\n".join(wrong)


def _circle(edges: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, the first again at the end; none: an empty list."""
    done: set[str] = set()

    def walk(module: str, trail: list[str]) -> list[str]:
        if module in trail:
            return [*trail[trail.index(module) :], module]
        found: list[str] = []
        if module not in done:
            for name in sorted(edges[module]):
                found = found or walk(name, [*trail, module])
            done.add(module)
        return found

    return next((found for found in (walk(module, []) for module in edges) if found), [])


def test_no_cycles_between_files():
    # at the top of a file or inside its functions: a circle is a circle, even where Python can untie it
    edges = {_module(path): _imports(path) for path in FILES}
    edges = {
        module: {name if name in edges else name.rpartition(".")[0] for name in names} & set(edges) - {module}
        for module, names in edges.items()
    }
    assert _circle(edges) == []


def test_circles_are_found_inside_functions_too():
    tree = ast.parse("def later():\n    from sfumato.b import thing\n")
    inside = _named(SOURCE / "a.py", ast.walk(tree))
    assert inside == {"sfumato.b.thing"}
    assert _circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert _circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def _run(code: str) -> dict:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # the library prints nothing; transformers may, on stderr, when it is imported


LIGHT = [
    "sfumato",
    "sfumato.errors",
    "sfumato.cards",
    "sfumato.files",
    "sfumato.app",
    "sfumato.app.cli",
    "sfumato.registry",
    "sfumato.checkpoints",
]
LIGHT += ["sfumato.toybox", "sfumato.toybox.scene", "sfumato.toybox.captions"]
LIGHT += [_module(path) for path in FILES if _room(path) == "app" and path.name != "__init__.py"]


def test_light_modules_stay_light():
    heavy = ["torch", "diffusers", "transformers", "accelerate", "matplotlib", "gradio", "PIL"]
    code = f"import sys, json, importlib; [importlib.import_module(m) for m in {LIGHT}]; "
    assert _run(code + f"print(json.dumps([m for m in {heavy} if m in sys.modules]))") == []


def test_help_imports_nothing_heavy():
    # how long it takes is measured in benchmarks/imports.py, as a share of `import torch`
    code = """
import json, sys, io, contextlib
from sfumato.app.cli import app
with contextlib.redirect_stdout(io.StringIO()) as out:
    try:
        app(["--help"])
    except SystemExit as left:
        assert left.code == 0
assert "make" in out.getvalue()
heavy = {"torch", "numpy", "scipy", "diffusers", "transformers", "accelerate", "peft", "matplotlib", "PIL", "av", "ray"}
print(json.dumps(sorted(heavy & set(sys.modules))))
"""
    assert _run(code) == []


@pytest.fixture(scope="module")
def everything() -> dict:
    """What changes when all of it is imported, and what the verbs are before and afterwards."""
    modules = [_module(path) for path in FILES if path.name != "__main__.py"]
    code = f"""
import json, importlib, locale, logging, os, random, signal, sys, warnings
import numpy, torch, diffusers, transformers, accelerate, peft, PIL.Image, matplotlib, pydantic, typer
import torch.nn.functional as F
from diffusers.utils import logging as dlog
from transformers.utils import logging as tlog

def state():
    return dict(
        environment=dict(os.environ), filters=len(warnings.filters), showwarning=repr(warnings.showwarning),
        excepthook=repr(sys.excepthook), recursion=sys.getrecursionlimit(), path=list(sys.path), cwd=os.getcwd(),
        threads=torch.get_num_threads(), dtype=repr(torch.get_default_dtype()), grad=torch.is_grad_enabled(),
        rng=torch.get_rng_state().tolist(), numpy=repr(numpy.random.get_state()), random=repr(random.getstate()),
        deterministic=torch.are_deterministic_algorithms_enabled(), flash=torch.backends.cuda.flash_sdp_enabled(),
        matmul=torch.get_float32_matmul_precision(), root=logging.getLogger().level,
        handlers=len(logging.getLogger().handlers),
        diffusers=dlog.get_verbosity(), transformers=tlog.get_verbosity(), bars=dlog.is_progress_bar_enabled(),
        interrupt=repr(signal.getsignal(signal.SIGINT)), sdpa=id(F.scaled_dot_product_attention), softmax=id(F.softmax),
        forward=id(torch.nn.Module.__call__), backend=matplotlib.rcParams["backend"], pixels=PIL.Image.MAX_IMAGE_PIXELS,
        stdout=id(sys.stdout), locale=locale.setlocale(locale.LC_ALL),
    )

before = state()
import sfumato
names = [name for name in sfumato.__all__ if name != "__version__"]
verbs = [all(callable(getattr(sfumato, name)) for name in names)]
for name in {modules}:
    importlib.import_module(name)
after = state()
verbs.append(all(callable(getattr(sfumato, name)) for name in names))
import sfumato.explain
print(json.dumps(dict(
    changed=[key for key in before if before[key] != after[key]], verbs=verbs,
    models=sfumato.models() == sfumato.app.models(), room=sfumato.explain.__name__,
    not_listed=sorted(set(sfumato.__all__) - set(dir(sfumato))),
)))
"""
    return _run(code)


def test_importing_everything_changes_nothing_global(everything):
    assert everything["changed"] == []


def test_verbs_are_rooms_and_rooms_are_verbs(everything):
    assert everything["verbs"] == [True, True] and everything["models"] and everything["not_listed"] == []
    assert everything["room"] == "sfumato.explain"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'paint'"):
        _ = sfumato.paint


def test_a_class_name_has_one_meaning():
    found: dict[str, list[str]] = {}
    for path in FILES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(_module(path))
    assert {name: modules for name, modules in found.items() if len(modules) > 1} == {}
