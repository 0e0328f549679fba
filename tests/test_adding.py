"""Adding a system is one file, one claim and one page: in a copy of the tree it is then found everywhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SYSTEM = '''"""A system of three lines: latents are made a little darker."""

from __future__ import annotations

from typing import Any

from sfumato import cards
from sfumato.cards import Card, Field, register
from sfumato.sampling import Intervention, Step


@register
class Dimmed(Intervention):
    """Scales the latents after every step."""

    CARD = Card(
        key="dimmed",
        title="Dimming pictures",
        authors="Leonardo",
        year=1503,
        verb="steer",
        needs=("noise_path",),
        defaults_from="a notebook",
        cost="nothing",
        summary="makes latents a little smaller",
    )
    role = "steerer"

    class Params(cards.Params):
        strength: float = Field(default=0.1, ge=0, le=1, description="share that is taken away")

    def __init__(self, **given: Any):
        self.params = self.Params(**given)

    def after_step(self, step: Step) -> None:
        if self.strength:
            step.x = step.x * (1 - self.strength)
            self.mark(step)
'''
CLAIM = '''"""Dimmed pictures are darker."""

from claims import core

EXPERIMENT = core.Experiment(key="dimmed", title="Dimming", intro="", file=__file__, parts=())
'''
PAGE = "# Dimmed: darker pictures\n\nWhat it is for.\n"


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """The repository without its weights, pictures and results (which are linked), and three new files."""
    target = tmp_path_factory.mktemp("house") / "sfumato"
    target.mkdir()
    weights = ROOT / "src" / "sfumato" / "zoo" / "weights"
    heavy = shutil.ignore_patterns("weights", "images", "pictures", "__pycache__", ".*")
    for name in ("src", "claims", "docs", "tests"):
        shutil.copytree(ROOT / name, target / name, ignore=heavy)
    (target / "src" / "sfumato" / "zoo" / "weights").symlink_to(weights)
    (target / "docs" / "images").symlink_to(ROOT / "docs" / "images")
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, target / name)
    (target / "src" / "sfumato" / "steer" / "dimmed.py").write_text(SYSTEM)
    (target / "claims" / "dimmed.py").write_text(CLAIM)
    (target / "docs" / "systems" / "dimmed.md").write_text(PAGE)
    return target


EVERYTHING = """
import contextlib, io, json, sys

def said_by(call, *args):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        call(*args)
    return out.getvalue()

from sfumato.app.cli import app
told = {"commands": [said_by(app, command) for command in json.loads(sys.argv[1])]}

from docs import generate
told["written"], told["again"] = said_by(generate.main, []), said_by(generate.main, [])

# which pairs go together is measured elsewhere: here each is said to, and nothing is needed to try it
from tests import examples
from tests.contract import matrix
matrix._outcome = lambda *_: ""
examples.write_examples = lambda *_: None
matrix.main()

import pytest
quiet = ["-q", "-p", "no:cacheprovider"]
told["contract"] = said_by(pytest.main, [*quiet, "--collect-only", "tests/contract", "-k", "dimmed"])
told["house"] = said_by(pytest.main, [*quiet, "tests/test_imports.py", "-k", "below or cycles"])
print(json.dumps(told))
"""
COMMANDS = [
    ["methods", "--verb", "steer"],
    ["methods", "dimmed"],
    ["make", "a red cube", "--with", "dimmed:strength=0.2", "--steps", "1"],
]


def run(tree: Path, *args: str) -> str:
    paths = os.pathsep.join([str(tree / "src"), str(tree)])
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *args], cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def told(tree) -> dict:
    """What the house says of the system, asked in one process."""
    return json.loads(run(tree, "-c", EVERYTHING, json.dumps(COMMANDS)).splitlines()[-1])


def test_it_is_listed_described_and_drawn_with(told, tree):
    listed, described, made = told["commands"]
    assert "dimmed" in listed
    assert "Dimming pictures" in described and "share that is taken away" in described and "animatediff" in described
    assert made == "out/a-red-cube-0.png\n" and (tree / made.strip()).is_file()


def test_one_command_writes_it_into_every_table(told, tree):
    pages = ["README.md", "docs/models.md", "docs/systems/README.md", "docs/systems/dimmed.md"]
    assert sorted(told["written"].splitlines()) == pages and told["again"] == ""
    assert "| [`dimmed`](docs/systems/dimmed.md) | steer | makes latents a little smaller |" in (
        tree / "README.md"
    ).read_text(encoding="utf-8")
    assert "[`dimmed`](dimmed.md)" in (tree / "docs" / "systems" / "README.md").read_text(encoding="utf-8")
    page = (tree / "docs" / "systems" / "dimmed.md").read_text(encoding="utf-8")
    assert page.startswith(PAGE.strip()) and "| `strength` | `0.1` | share that is taken away (>= 0, <= 1) |" in page


def test_it_is_in_the_composition_table(told, tree):
    assert ". `dimmed` |" in (tree / "docs" / "composition.md").read_text(encoding="utf-8")


def test_its_claim_is_listed(tree):
    assert "dimmed" in run(tree, "-m", "claims", "--help")


def test_the_contract_suite_and_the_checks_of_the_house_take_it_up(told):
    assert told["contract"].count("dimmed") > 10 and "2 passed" in told["house"]
