"""``sfumato judge SETS --by data_biases`` from the command line: what is written, printed and refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from sfumato.models.nets.vector_ae import VectorAutoencoder


def folder(path: Path, n: int, words: str) -> Path:
    """``n`` flat pictures; column ``hue`` goes through the letters of ``words``, ``tag`` is the folder's own."""
    path.mkdir()
    rows = []
    for i in range(n):
        Image.new("RGB", (16, 16), (i % 7 * 30, 90, i % 3 * 80)).save(path / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "hue": words[i % len(words)], "tag": path.name}))
    (path / "metadata.jsonl").write_text("\n".join(rows))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sets")
    torch.manual_seed(0)
    VectorAutoencoder(16, (8, 8), 10).save_pretrained(root / "ae")
    for name, n, words in (("photos", 40, "ab"), ("paintings", 40, "abc"), ("few", 10, "ab")):
        folder(root / name, n, words)
    return root


def by(place: Path, **more: str) -> str:
    given = {"autoencoder": place / "ae", "blocks": 1, "hidden": 8, "steps": 2, "batch": 16, "pictures": 40, **more}
    return "data_biases:" + ",".join(f"{key}={value}" for key, value in given.items())


def test_sets_are_judged_and_written(sfumato, place):
    with_words = by(place, concepts="[hue]")
    done = sfumato("judge", place / "photos", place / "paintings", "--by", with_words, "-o", "biases")
    assert done.code == 0, done.err
    assert done.lines[0].startswith("photos -> paintings: style changes a picture by") and done.lines[-1] == "biases"
    assert any(line.startswith("concepts are read off codes") for line in done.lines)
    assert {path.name for path in Path("biases").iterdir()} == {"data_biases.json", "data_biases.png", "flow"}
    written = json.loads(Path("biases/data_biases.json").read_text())
    assert written["sets"] == ["photos", "paintings"] and len(written["pairs"]) == 2
    told = sfumato(
        "judge", place / "photos", "--also", place / "paintings", "--by", with_words, "--json", "-o", "again"
    )
    assert json.loads(told.out)["pairs"] == written["pairs"]  # --also names a set as well, and the seed decides


def test_sets_that_cannot_be_judged_are_refused_in_one_line(refused, place):
    photos, paintings = place / "photos", place / "paintings"
    for sets, more, says in (
        ((photos,), by(place), ["two data sets or more, got 1"]),
        ((photos, photos), by(place), ["two of the data sets are called 'photos'"]),
        ((photos, place / "few"), by(place), ["few holds 10 pictures", "32 or more"]),
        ((photos, paintings), by(place, concepts="[tag]"), ["no value of 'tag' in common"]),
        ((photos, paintings), by(place, concepts="[hues]"), ["'hues'", "Did you mean 'hue'"]),
        ((photos, place / "nowhere"), by(place), ["nowhere"]),
        ((photos, "toybox:baised"), by(place), ["'baised'", "'biased'"]),
        ((photos, paintings), by(place, autoencoder="toy-ea"), ["toy-ea", "toy-ae"]),
        ((photos, paintings), by(place, steps="0"), ["steps"]),
        ((photos, paintings), by(place, batch="1"), ["batch"]),
        ((photos, paintings, "--metric", "frechet"), by(place), ["--also, -o and --json alone"]),
    ):
        refused("judge", *sets, "--by", more, "-o", "out", says=says)
    refused("judge", photos, paintings, "--also", photos, says=["--also names a further set"])
