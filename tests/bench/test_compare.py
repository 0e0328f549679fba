"""Two folders pair by pair: planted differences, tests, pairing rules, one page that needs nothing beside it."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from sfumato.bench.compare import Pairs, compare_folders, matching
from sfumato.bench.folder import Folder
from sfumato.errors import BadInput
from sfumato.metrics import stats


@pytest.fixture(scope="module")
def spoilt(renders, tmp_path_factory):
    """The same folder with the first 12 pictures replaced by empty ones, and times beside each."""
    folder = tmp_path_factory.mktemp("spoilt") / "spoilt"
    shutil.copytree(renders, folder)
    for i in range(12):
        Image.new("RGB", (64, 64), (120, 180, 90)).save(folder / f"{i:03d}.png")
    return folder


def test_a_planted_difference_is_found_with_its_test(renders, spoilt, tmp_path):
    report = compare_folders(renders, spoilt, out=tmp_path / "out", names=("whole", "spoilt"), shown=5)
    there = report["all_present: whole - spoilt"]
    folder = Folder(renders)
    prompts = {folder.about(name)["text"] for name in folder.names}
    assert there.n == len(prompts) and there.low > 0 and there.p < 0.01 and 0.1 < there.value < 0.4
    assert report["CLIPScore(toy-clip): whole - spoilt"].value > 0
    gap = report["perceptual(toy-vae)"]
    assert 0 < gap.low < gap.value
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<figure>") == 5 and page.count("whole right, spoilt wrong") >= 10  # alt and caption
    assert json.loads((tmp_path / "out" / "report.json").read_text())["pairs"] == 40


def test_equal_folders_do_not_differ(renders, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(renders, copy)
    report = compare_folders(renders, copy, batch=7)
    assert report["perceptual(toy-vae)"].value == 0
    for figure in report.figures:
        if " - " in figure.name:
            assert figure.value.value == 0 and figure.value.low <= 0 <= figure.value.high


def test_distances_to_a_reference_and_unreadable_pairs(renders, spoilt, others, tmp_path, clip_folder):
    broken = tmp_path / "broken"
    shutil.copytree(spoilt, broken)
    (broken / "020.png").write_text("damage")
    (broken / "021.png").unlink()
    report = compare_folders(renders, broken, reference=others, net=str(clip_folder), names=("a", "b"))
    values = {figure.name: figure.value for figure in report.figures if figure.name.startswith("FD")}
    assert sorted(name[-1] for name in values) == ["a", "b"] and all(value > 0 for value in values.values())
    assert report.data["pairs"] == 38 and any("2 pairs could not be read: 020.png" in note for note in report.notes)


def test_several_pictures_of_a_prompt_are_one_piece_of_evidence():
    pairs = Pairs()
    rng = np.random.default_rng(0)
    for prompt in range(20):
        first, second = prompt % 2, (prompt // 2) % 2
        for _ in range(50):  # 50 times the same is not 50 times the evidence
            pairs.add("all_bound", str(prompt), first, second)
            pairs.add("clip_score", str(prompt), rng.normal(), rng.normal())
    got, test = pairs.difference("all_bound")
    assert test == "paired bootstrap" and got.n == 20 and got.value == 0
    alone = Pairs()
    for prompt in range(20):
        alone.add("all_bound", str(prompt), prompt % 2, (prompt // 2) % 2)
    single, test = alone.difference("all_bound")
    assert (
        test == "McNemar" and single.p == stats.mcnemar([i % 2 for i in range(20)], [i // 2 % 2 for i in range(20)]).p
    )
    assert got.high - got.low == pytest.approx(single.high - single.low, rel=0.25)
    few = Pairs()
    few.add("clip_score", "p", 2.0, 1.0)
    assert few.difference("clip_score")[0].value == 1


def folder_of(path, rows):
    path.mkdir()
    for i, (name, _) in enumerate(rows):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(path / name)
    lines = [json.dumps({"file_name": name, **about}) + "\n" for name, about in rows]
    (path / "metadata.jsonl").write_text("".join(lines))
    return Folder(path)


def test_pairs_are_matched_by_name_else_by_prompt_and_seed(tmp_path):
    one = folder_of(tmp_path / "a", [("x.png", {"text": "p", "seed": 1}), ("y.png", {"text": "q", "seed": 1})])
    two = folder_of(tmp_path / "b", [("1.jpg", {"text": "q", "seed": 1}), ("2.jpg", {"text": "p", "seed": 2})])
    three = folder_of(tmp_path / "c", [("y.png", {"text": "z", "seed": 9}), ("w.png", {})])
    assert matching(one, two) == [("y.png", "1.jpg")] and matching(one, three) == [("y.png", "y.png")]
    with pytest.raises(BadInput, match="there is no pair"):
        matching(two, three)
    twice = folder_of(tmp_path / "d", [("k.png", {"text": "p", "seed": 1}), ("l.png", {"text": "p", "seed": 1})])
    with pytest.raises(BadInput, match="k.png and l.png have the same prompt and seed"):
        matching(one, twice)
    with pytest.raises(BadInput, match="compared with itself"):
        compare_folders(tmp_path / "a", tmp_path / "a")
    with pytest.raises(BadInput, match="need different names"):
        compare_folders(tmp_path / "a", tmp_path / "b", names=("x", "x"))
