"""A tiny genuine model on disk, and the command line in this process."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from sfumato import registry
from sfumato.app.cli import app
from sfumato.models import Model
from sfumato.models.quiet import quiet
from tests.tiny import tiny_pipeline


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory) -> Path:
    """A diffusers folder with a randomly initialised Stable Diffusion of 32x32 pictures."""
    folder = tmp_path_factory.mktemp("models") / "tiny-sd"
    with quiet():
        tiny_pipeline("sd").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_inpaint(tmp_path_factory) -> Path:
    """The same as an inpainting pipeline."""
    folder = tmp_path_factory.mktemp("models") / "tiny-inpaint"
    with quiet():
        tiny_pipeline("inpaint").save_pretrained(folder)
    return folder


_loaded: dict[str, Model] = {}


@pytest.fixture
def loaded_once(monkeypatch, tmp_path_factory):
    """Built-in models and the folders made for a whole session are read once, not for every command: nobody changes
    them, and no run changes a model."""
    made = tmp_path_factory.getbasetemp()

    def stays(name):
        path = Path(name)
        of_the_session = path.parents[1:2] == (made,) and path.parent.name.startswith("models")
        return of_the_session or (registry.find(str(name)) is not None and not path.exists())

    models = importlib.import_module("sfumato.models")  # the package: sfumato.models itself is the list of them
    load = models.load

    def once(name, device="cpu", found=None, dtype=None, **given):
        if not stays(name) or device != "cpu" or any(given.values()):
            return load(name, device=device, found=found, dtype=dtype, **given)
        key = str(name) if dtype is None else f"{name} in {dtype}"
        if key not in _loaded:
            _loaded[key] = load(name, dtype=dtype)
        return _loaded[key]

    monkeypatch.setattr(models, "load", once)
    return _loaded


COMMAND = {app: get_command(app)}


@dataclass
class Outcome:
    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


@pytest.fixture
def sfumato(tmp_path, monkeypatch, loaded_once):
    """``sfumato("make", ...)`` in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("typer.testing._get_command", COMMAND.__getitem__)  # or typer builds it for every call

    def call(*args: object) -> Outcome:
        done = CliRunner().invoke(app, [str(arg) for arg in args])
        return Outcome(done.exit_code, done.stdout, done.stderr)

    return call


@pytest.fixture
def refused(sfumato, tmp_path):
    """Asserts that a command line is refused in one line that holds each of ``says``, and leaves nothing behind."""

    def check(*args: object, says: tuple[str, ...] | list[str] = ()) -> None:
        before = _tree(tmp_path)
        outcome = sfumato(*args)
        message = outcome.err
        assert outcome.code == 2, f"exit code {outcome.code}: {outcome.out}{message}"
        assert message.startswith("error: ") and message.count("\n") == 1 and len(message) < 700, message
        for part in says:
            assert part in message, f"{part!r} is not in {message!r}"
        assert "Traceback" not in message and outcome.out == ""
        assert _tree(tmp_path) == before, "something was left behind"

    return check


def _tree(folder: Path) -> set[str]:
    return {os.path.join(where, name) for where, folders, names in os.walk(folder) for name in folders + names}
