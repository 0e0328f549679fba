"""``sfumato judge``, ``sfumato compare`` and ``sfumato toybox prompts`` from the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import sfumato as package
from sfumato.bench.report import Report
from sfumato.errors import BadInput
from tests.folders import write_renders


@pytest.fixture(scope="session")
def toys(tmp_path_factory) -> Path:
    return write_renders(tmp_path_factory.mktemp("toys") / "toys", 24)


def test_judge_prints_and_writes_a_report_and_goes_on(sfumato, toys, monkeypatch):
    done = sfumato("judge", toys, "--metric", "presence", "-o", "report")
    assert done.code == 0, done.err
    assert done.lines[0].startswith("present ") and done.lines[-2:] == ["report/report.json", "report/report.html"]
    told = json.loads(sfumato("judge", toys, "--metric", "presence", "-o", "report", "--json").out)
    assert told["figures"]["present"]["n"] >= 24 and told["pictures"]["seen"] == 24
    assert len(Path("report/pictures.jsonl").read_text().splitlines()) == 24

    from sfumato.bench import survey

    look = survey._look

    def interrupted(folder, names, evaluators, tally, *rest):
        if tally.done:
            raise KeyboardInterrupt
        return look(folder, names, evaluators, tally, *rest)

    monkeypatch.setattr(survey, "_look", interrupted)
    stopped = sfumato("judge", toys, "--metric", "presence", "--batch", 8, "-o", "again")
    assert stopped.code == 130 and "the same command goes on" in stopped.err


def test_two_folders_as_the_issue_writes_it(sfumato, toys, tmp_path):
    shutil.copytree(toys, tmp_path / "fake")
    Path("a.txt").write_text("red\nblue\n")
    options = ("--attributes", "a.txt", "--metric", "attributes", "--draws", 2)
    done = sfumato("judge", toys, "fake", *options)
    assert done.code == 0, done.err
    assert any(line.startswith("SaD") for line in done.lines) and "judged/report-pairs.png" in done.lines


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("nowhere",), ["'nowhere' does not exist"]),
        ((".",), ["holds no picture"]),
        (("{toys}", "{toys}", "--real", "x"), ["give the real pictures once"]),
        (("{toys}", "--real", "x", "--reference", "y"), ["the earlier name of --real"]),
        (("{toys}", "--metric", "fid"), ["unknown metric 'fid'"]),
        (("{toys}", "--metric", "frechet"), ["frechet needs a folder of real pictures (--real)"]),
        (("{toys}", "--attributes", "none.txt"), ["none.txt", "No such file"]),
        (("{toys}", "--attributes", "captions", "--attribute", "b"), ["'captions'"]),
        (("{toys}", "{toys}"), ["both the folder and its reference"]),
        (("{toys}", "--no-captions"), ["no captions and there are no real pictures"]),
        (("{toys}", "--cap", 1), ["cap of judge is 1"]),
        (("{toys}", "--prompts", "missing.jsonl"), ["missing.jsonl", "No such file"]),
        (("{toys}", "--clip", "toy-clop"), ["'toy-clop'", "'toy-clip'"]),
    ],
)
def test_judge_refuses(refused, toys, args, says):
    refused("judge", *[str(arg).format(toys=toys) for arg in args], says=says)


def test_prompt_sets_are_written(sfumato):
    done = sfumato("toybox", "prompts", "--task", "two", "--task", "position", "-n", 3, "-o", "p.jsonl", "--seed", 4)
    assert done.lines == ["p.jsonl"]
    rows = [json.loads(line) for line in Path("p.jsonl").read_text().splitlines()]
    assert [row["task"] for row in rows] == ["two"] * 3 + ["position"] * 3 and rows[0]["seed"] == 4
    assert sfumato("toybox", "prompts", "--task", "tow").code == 2


def test_two_settings_of_one_model(sfumato, tiny_sd):
    Path("p.jsonl").write_text(
        '{"prompt": "a red cube", "task": "one"}\n{"prompt": "a blue ball", "seed": 5}\nbroken\n', encoding="utf-8"
    )
    command = ("compare", f"{tiny_sd}:steps=1", f"{tiny_sd}:steps=2,guidance=3", "--prompts", "p.jsonl", "-o", "out")
    done = sfumato(*command)
    assert done.code == 0, done.err
    assert "warning: 1 of 3 lines could not be followed: line 3" in done.err
    told = json.loads(Path("out/report.json").read_text())
    cost = next(value for name, value in told["sides"].items() if name == "cost")
    assert cost == [2.0, 4.0] or cost[1] > cost[0]  # forward-equivalents of 1 and 2 steps
    assert told["pairs"] == 2 and any(name.startswith("seconds: ") for name in told["figures"])
    pictures = sorted(path.name for path in Path("out/pictures-a").glob("*.png"))
    assert pictures == ["a-blue-ball-5.png", "a-red-cube-0.png"]
    assert (Path("out") / "report.html").read_text().count("data:image/png") == 2
    before = {path: path.stat().st_mtime_ns for path in Path("out").glob("pictures-*/*")}
    assert sfumato(*command).code == 0
    assert before == {path: path.stat().st_mtime_ns for path in Path("out").glob("pictures-*/*")}  # nothing made anew


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("{toys}", "toy-sd"), ["one is a folder and one a model"]),
        (("toy-sd", "toy-sd3"), ["needs prompts"]),
        (("toy-sd", "toy-sd", "--prompt", "a cube"), ["the same settings"]),
        (("toy-sd:stepz=3", "toy-sd", "--prompt", "a cube"), ["unknown parameter of make 'stepz'"]),
        (("{toys}", "{toys}"), ["compared with itself"]),
        (("{toys}", "{toys}", "--steps", 3), ["compared as they are"]),
        (("a", "b", "--prompt", "x", "--task", "two"), ["one of --prompts"]),
        (("toy-sd", "no-such", "--prompt", "a cube"), ["unknown model 'no-such'"]),
        (("toy-sd", "toy-sd:steps=2", "--prompts", "none.jsonl"), ["none.jsonl", "No such file"]),
    ],
)
def test_compare_refuses(refused, toys, args, says):
    refused("compare", *[str(arg).format(toys=toys) for arg in args], says=says)


def test_the_python_face(toys, tmp_path, tiny_sd):
    report = package.judge(toys, metrics=["presence"])
    assert isinstance(report, Report) and report["present"].n >= 24 and not report.files
    model = package.load(tiny_sd)
    sides = {"model": model, "steps": 1}, {"model": model, "steps": 2}
    found = package.compare(*sides, prompts=["a red cube", "a blue ball"], out=tmp_path / "out")
    assert found["perceptual(toy-vae)"].n == 2
    with pytest.raises(BadInput, match="needs out"):
        package.compare(*sides, prompts=["a"])
    with pytest.raises(BadInput, match="prompts is empty"):
        package.compare(*sides, prompts=[], out=tmp_path / "out")
