"""Clips in files: whole or absent, their frames and speed kept, the recipe found again."""

from __future__ import annotations

import os

import av
import numpy as np
import pytest
from PIL import Image

from sfumato import clips, files
from sfumato.errors import BadInput

RECIPE = {
    "prompt": "ein roter Würfel, “quoted” 猫",
    "seed": 7,
    "steps": 20,
    "guidance": 7.5,
    "size": [48, 32],
    "model": "toy",
    "frames": 6,
    "with": [{"method": "daam", "params": {"words": ["x" * 700]}}],
}


def moving(f=6, h=32, w=48):
    """A bright square that walks over a ground of its own shade."""
    frames = np.full((f, h, w, 3), (30, 60, 90), np.uint8)
    for i in range(f):
        frames[i, 8:20, 4 * i : 4 * i + 12] = (220, 180, 40)
    return frames


@pytest.mark.parametrize("suffix", clips.FORMATS)
def test_frames_speed_and_recipe_come_back(tmp_path, suffix):
    frames = moving()
    path = clips.save_clip(tmp_path / f"clip{suffix}", frames, RECIPE, fps=12)
    assert os.listdir(tmp_path) == [path.name]
    back, fps = clips.read_clip(path)
    assert back.shape == frames.shape and fps == pytest.approx(12, rel=0.01)
    error = np.abs(back.astype(int) - frames).mean((1, 2, 3))
    assert error.max() <= {".webp": 0, ".gif": 2, ".mp4": 6}[suffix]
    recipe, exact = files.read_recipe(path)
    assert exact and recipe == RECIPE


def test_the_same_clip_is_the_same_bytes(tmp_path):
    for suffix in clips.FORMATS:
        one, two = (clips.save_clip(tmp_path / f"{name}{suffix}", moving(), RECIPE).read_bytes() for name in "ab")
        assert one == two


def test_an_mp4_is_what_browsers_play(tmp_path):
    path = clips.save_clip(tmp_path / "odd.mp4", moving(h=33, w=47), RECIPE)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert (stream.width, stream.height, stream.frames) == (48, 34, 6)  # whole pairs of pixels


def test_a_gif_loops_at_its_speed(tmp_path):
    path = clips.save_clip(tmp_path / "x.gif", moving(), RECIPE, fps=8)
    with Image.open(path) as image:
        assert image.info["loop"] == 0 and image.n_frames == 6
        durations = []
        for i in range(6):
            image.seek(i)
            durations.append(image.info["duration"])
    assert sum(durations) == 750 and set(durations) == {120, 130}


def test_a_webp_also_speaks_the_dialect_of_others(tmp_path):
    path = clips.save_clip(tmp_path / "x.webp", moving(), RECIPE)
    with Image.open(path) as image:
        comment = image.getexif().get_ifd(0x8769)[0x9286]
    assert comment[8:].decode("utf-16-be") == files.a1111_text(RECIPE)


def test_bad_input_is_refused_and_leaves_nothing(tmp_path):
    for name, frames, fps, told in (
        ("x.png", moving(), 8, "must end in .mp4, .gif, .webp"),
        ("x.mp4", moving().astype(float), 8, r"float64 \(6, 32, 48, 3\)"),
        ("x.mp4", moving()[0], 8, r"they must be bytes \(f h w 3\)"),
        ("x.mp4", moving()[:0], 8, "they must be bytes"),
        ("x.gif", moving(), 60, "gif takes above 0 and up to 50"),
        ("x.mp4", moving(), 0, "fps is 0"),
    ):
        with pytest.raises(BadInput, match=told):
            clips.save_clip(tmp_path / name, frames, RECIPE, fps)
    assert os.listdir(tmp_path) == []
    with pytest.raises(ValueError):  # no number that JSON lacks
        clips.save_clip(tmp_path / "x.mp4", moving(), {"seed": float("nan")})
    assert os.listdir(tmp_path) == []


def test_an_older_clip_survives_a_failure(tmp_path, monkeypatch):
    path = clips.save_clip(tmp_path / "x.mp4", moving(), RECIPE)
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(OSError, match="disk full"):
        clips.save_clip(path, moving()[::-1], RECIPE)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["x.mp4"]


def test_strangers_files_are_told_apart(tmp_path):
    for name in ("x.mp4", "x.webm"):
        (tmp_path / name).write_bytes(b"nothing of the kind" * 100)
        with pytest.raises(BadInput, match="cannot be read as a video"):
            files.read_recipe(tmp_path / name)
        with pytest.raises(BadInput, match="cannot be read as a video"):
            clips.read_clip(tmp_path / name)
    plain = tmp_path / "plain.gif"
    Image.new("RGB", (8, 8)).save(plain, comment=b"made by hand")
    with pytest.raises(BadInput, match="carries no recipe"):
        files.read_recipe(plain)
    damaged = clips.save_clip(tmp_path / "y.gif", moving(), RECIPE)
    damaged.write_bytes(damaged.read_bytes().replace(b'sfumato {"prompt"', b'sfumato {"prompt '))
    with pytest.raises(BadInput, match="damaged recipe"):
        files.read_recipe(damaged)
    with pytest.raises(OSError):
        clips.read_clip(tmp_path / "none.mp4")


def test_long_recipes_are_not_read(tmp_path):
    path = clips.save_clip(tmp_path / "x.mp4", moving(), {**RECIPE, "prompt": "a" * (files.LONGEST_RECIPE + 1)})
    with pytest.raises(BadInput, match="more than"):
        files.read_recipe(path)
