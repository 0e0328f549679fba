"""A tiny genuine model on disk, and the command line in this process."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sfumato.cli import app
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


@dataclass
class Outcome:
    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


@pytest.fixture
def sfumato(tmp_path, monkeypatch):
    """``sfumato("make", ...)`` in an empty working folder."""
    monkeypatch.chdir(tmp_path)

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
