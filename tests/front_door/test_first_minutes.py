"""What is seen and counted before a training has walked its first steps."""

from __future__ import annotations

import importlib
import io
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sfumato.app.cli import show
from sfumato.training import Player, Progress, runs
from sfumato.training.trainer import Trainer


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    seen = Terminal()
    monkeypatch.setattr(show, "sys", SimpleNamespace(stderr=seen, stdout=sys.stdout))
    return seen


@pytest.mark.parametrize("note", ["", "2/3 [so]"])
def test_bars_on_a_terminal(terminal, note):
    with show.bar("pictures", after=0) as bar:
        bar(0, 3)
        bar(2, 3, 0.5, note)
    assert (note or "2/3 pictures") in terminal.getvalue()


def test_a_bar_waits_for_work_that_takes_long(terminal, monkeypatch):
    clock = iter((0.0, 1.0, 3.0, 4.0, 5.0))
    monkeypatch.setattr(show, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with show.bar("pictures") as bar:
        bar(0, 3)
        assert not terminal.getvalue()
        bar(1, 3)
        assert terminal.getvalue()
    assert "1/3 pictures" in terminal.getvalue()


@pytest.mark.parametrize("command", ["train", "teach", "make", "judge", "compare"])
def test_commands_draw_their_bar(terminal, monkeypatch, sfumato, command):
    """As soon as the first news comes, for a training from the first second."""
    whole = show.bar
    monkeypatch.setattr(show, "bar", lambda unit, after=0.0: whole(unit, 0.0))

    def train(*_, on_progress, **__):
        for doing in ("preparing", ""):
            on_progress(Progress(0, 7, {}, 0.0, doing))
        on_progress(Progress(1, 7, {"loss": 0.5}, 0.0))
        on_progress(Progress(1, 7, {}, 0.0, "evaluating"))
        return SimpleNamespace(warnings=[], interrupted=False, finished=False, step=1)

    def others(*_, **given):
        tell = given.get("on_progress") or _[2]
        tell(1, 7, *([{"loss": 0.5}] if command == "teach" else []))
        raise KeyboardInterrupt

    face = importlib.import_module("sfumato.app")
    monkeypatch.setattr(face, "make_files" if command == "make" else command, train if command == "train" else others)
    said = {"teach": ["photos", "--name", "<rex>", "-o", "rex.safetensors"], "make": ["a cube"], "judge": ["a"],
            "compare": ["a", "b"], "train": ["toy-vae"]}[command]  # fmt: skip
    sfumato(command, *said)
    seen = terminal.getvalue()
    assert "1/7" in seen and "unexpected" not in seen
    if command == "train":
        assert "0/7 steps, preparing" in seen and "1/7 steps, loss 0.5, evaluating" in seen


def test_time_for_preparation_counts(monkeypatch, tmp_path):
    """``minutes`` run from the beginning, and each run comes on by a step at least."""
    heard, walked = [], []

    class Slow:
        main, folder, options = True, tmp_path, SimpleNamespace(steps=9)
        trainer = SimpleNamespace(signals=lambda *_: runs.contextlib.nullcontext(), step=0)

        def __init__(self, *_):
            assert [each.doing for each in heard] == ["preparing"]
            clock[0] += 90  # seconds of rendering and encoding

        def truncate_log(self):
            pass

        def fit(self, minutes, on_progress):
            walked.append(minutes)
            return runs.RunResult("toy-vae", tmp_path, 1, False, False, 0.0)

    clock = [0.0]
    monkeypatch.setattr(runs, "TrainingRun", Slow)
    monkeypatch.setattr(runs.registry, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(runs, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    runs.run("toy-vae", minutes=2, on_progress=heard.append)
    assert walked == [0.5]
    assert json.loads((tmp_path / "result.json").read_text())["step"] == 1


@pytest.mark.parametrize("minutes", [-1.0, 1e-9])
def test_a_run_without_time_left_does_one_step(minutes):
    net = nn.Linear(2, 1)

    def loss(draw):
        return net(torch.ones(1, 2)).square().mean()

    trainer = Trainer(Player(loss, torch.optim.SGD(net.parameters(), 0.1), net))
    for expected in (1, 2):
        assert trainer.walk(5, lambda logs: None, minutes) is False
        assert trainer.step == expected
    trainer.stop()
    trainer.walk(5, lambda logs: None, minutes)
    assert trainer.step == 2  # Ctrl-C before the first step ends it all the same
