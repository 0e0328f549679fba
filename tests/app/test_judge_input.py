"""What ``sfumato judge`` says of folders that are not as they should be, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from sfumato.toybox import Scene, Toy, render
from tests.folders import write_renders


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """``real``, ``fake``: 22 renders each; ``one`` picture, ``mixed`` sizes, ``damaged`` files, only ``ruins``."""
    root = tmp_path_factory.mktemp("folders")
    write_renders(root / "real", 22)
    write_renders(root / "fake", 22, seed=1)
    write_renders(root / "one", 1)
    for i, size in enumerate(((128, 64), (40, 90), (200, 200))):
        path = write_renders(root / "mixed", 6) / "000.png" if i == 0 else root / "mixed" / f"00{i}.png"
        Image.open(path).resize(size).save(path)
    damaged = write_renders(root / "damaged", 8)
    (damaged / "000.png").write_bytes(b"")
    (damaged / "001.png").write_bytes((damaged / "001.png").read_bytes()[:300])
    (damaged / "002.png").write_text("hello")
    (damaged / "003.png").unlink()
    for path in write_renders(root / "ruins", 2).glob("*.png"):
        path.write_bytes(b"x")
    (root / "empty").mkdir()
    for name, start in (("balls", -0.5), ("balls2", -0.4)):  # no cone on either side
        (root / name).mkdir()
        scenes = [Scene((Toy("ball", "red" if i % 3 else "blue", x=start + i / 25),)) for i in range(22)]
        frames = render(scenes)
        for i in range(22):
            frames.pil(i).save(root / name / f"{i:02d}.png")
    return root


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("{empty}",), ["holds no picture"]),
        (("{ruins}", "--metric", "presence"), ["none of the 2 pictures", "000.png"]),
        (("{one}", "{fake}", "--metric", "frechet"), ["at least 2 pictures on each side"]),
        (("{real}", "{one}", "--metric", "kernel"), ["at least 2 pictures on each side"]),
        (("{real}", "{one}", "--metric", "manifold"), ["5 neighbours need more pictures than"]),
        (("{real}", "{one}", "--attribute", "red", "--no-captions"), ["at least 20 pictures on each side"]),
        (
            ("{real}", "{fake}", "--attribute", "unicorn"),
            ["'unicorn' occurs in no caption of either folder", "--no-captions"],
        ),
        (("{balls}", "{balls2}", "--attribute", "cone", "--attribute", "red", "--oracle"), ["'cone'", "seen are red"]),
        (("{real}", "{fake}", "--attribute", " "), ["attributes are empty"]),
        (("{real}", "{fake}", "--attribute", "red", "--template", "a toy"), ["template"]),
        (("{real}", "--batch", 0), ["batch of judge is 0"]),
        (("{real}", "--seed", -1), ["seed of judge is -1"]),
        (("{real}", "{fake}", "--draws", -4), ["draws of judge is -4"]),
        (("{real}", "{fake}", "--dtype", "int8"), ["unknown dtype 'int8'"]),
    ],
)
def test_refused_in_one_line(refused, folders, args, says):
    names = {path.name: path for path in folders.iterdir()}
    refused("judge", *[str(arg).format(**names) for arg in args], says=says)


def test_one_picture_has_rates_and_no_spread(sfumato, folders):
    done = sfumato("judge", folders / "one", "--metric", "presence", "--metric", "clip_score")
    assert done.code == 0, done.err
    told = json.loads(Path("judged/report.json").read_text())["figures"]
    assert told["counted"]["n"] == 1 and told["CLIPScore(toy-clip)"]["low"] is None


def test_mixed_sizes_are_resized_and_counted(sfumato, folders):
    done = sfumato("judge", folders / "mixed", "--metric", "presence")
    assert done.code == 0 and "3 pictures were resized" in done.out
    assert json.loads(Path("judged/report.json").read_text())["pictures"]["resized"] == 3


def test_damaged_files_are_skipped_counted_and_named(sfumato, folders):
    done = sfumato("judge", folders / "damaged", "--metric", "presence")
    assert done.code == 0, done.err
    pictures = json.loads(Path("judged/report.json").read_text())["pictures"]
    assert pictures["seen"] == 4 and pictures["failed"] == 4
    assert [name for name, _ in pictures["named"]] == [f"00{i}.png" for i in range(4)]
    page = Path("judged/report.html").read_text()
    assert "4 files could not be read" in page and all(f"00{i}.png" in page for i in range(4))


def test_half_precision_is_near(sfumato, folders):
    figures = {}
    for dtype in ("float32", "bfloat16", "float16"):
        command = ("judge", folders / "real", folders / "fake", "--metric", "frechet", "--no-captions", "-o", dtype)
        assert sfumato(*command, "--dtype", dtype).code == 0
        figures[dtype] = json.loads(Path(dtype, "report.json").read_text())["figures"]["FD(toy-clip)"]
    assert figures["bfloat16"] == pytest.approx(figures["float32"], rel=0.1)
    assert figures["float16"] == pytest.approx(figures["float32"], rel=0.1)


def test_one_picture_against_others_is_judged_without_distances(sfumato, folders):
    done = sfumato("judge", folders / "real", folders / "one")
    assert done.code == 0, done.err
    told = json.loads(Path("judged/report.json").read_text())
    assert "counted" in told["figures"] and not any(name.startswith(("FD", "KD")) for name in told["figures"])
    assert any("at least 2 pictures on each side" in note for note in told["notes"])
