"""The package as it is shipped: no dependency that nothing imports, and a wheel that draws outside the repository."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODULES = {"pillow": "PIL", "freia": "FrEIA", "huggingface_hub": "huggingface_hub", "torch-fidelity": "torch_fidelity"}
TOOLS = {"pytest", "pytest-xdist", "ruff", "mypy", "torchsde"}  # run, or imported by diffusers


def _imported(*folders: str) -> set[str]:
    found: set[str] = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        found |= set(re.findall(r'(?:import_module|importorskip)\("(\w+)', text))
        if set(re.findall(r"^ *(?:import|from) +(\w+)", text, re.M)) <= found:
            continue  # nothing new
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
    return found


def _required(text: str) -> list[str]:
    """Names of the distributions in a list of requirements of pyproject.toml."""
    return [re.match(r"[\w.-]+", each)[0].lower() for each in re.findall(r'"([^"]+)"', text)]


def test_every_dependency_is_imported():
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    needed = _required(re.search(r"^dependencies = \[(.*?)^\]", pyproject, re.DOTALL | re.MULTILINE)[1])
    used = _imported("src")
    unused = [name for name in needed if MODULES.get(name, name.replace("-", "_")) not in used]
    assert not unused, f"nothing in src imports {unused}"
    everywhere = used | _imported("tests", "claims", "benchmarks", "docs")
    block = pyproject.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    for line in filter(None, map(str.strip, block.splitlines())):
        extra, _, listed = line.partition("=")
        home = everywhere if extra.strip() == "dev" else used
        for name in set(_required(listed)) - TOOLS:
            assert MODULES.get(name, name.replace("-", "_")) in home, f"extra {extra.strip()}: nothing imports {name}"


def test_every_dependency_is_pinned():
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").lower().replace("_", "-")
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = pyproject.partition("dependencies = [")[2].partition("[project.scripts]")[0]
    names = {name for name in _required(block) if name not in ("tomli",)}  # of older Pythons only
    pinned = set(re.findall(r"^([\w.-]+)==", constraints, re.MULTILINE))
    missing = {name for name in names if name.replace("_", "-") not in pinned}
    assert not missing, f"constraints.txt pins no {sorted(missing)}"


def test_a_wheel_draws_outside_the_repository(tmp_path):
    tree = tmp_path / "tree"  # building leaves files beside the sources
    shutil.copytree(ROOT / "src", tree / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(tmp_path)!r})"  # what pip calls
    done = subprocess.run([sys.executable, "-c", build], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    [wheel] = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 100e6
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "site")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "SFUMATO_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "sfumato", "make", "a red cube", "--steps", "2", "--with", "daam", "-o", "out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=elsewhere, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list((elsewhere / "out").glob("*.png"))) == 2
    where = [sys.executable, "-c", "import sfumato; print(sfumato.__file__)"]
    found = subprocess.run(where, capture_output=True, text=True, cwd=elsewhere, env=environment).stdout
    assert str(tmp_path) in found
