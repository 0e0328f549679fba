"""`sfumato make` with a model of clips: files, their recipes, repeating them, what is refused."""

from __future__ import annotations

import os
import re

import numpy as np
import pytest
from PIL import Image

from sfumato import clips, files
from sfumato.models import load
from sfumato.models.quiet import quiet
from sfumato.sampling import generate
from tests.tiny import tiny_pipeline

FAST = ("--steps", 1, "--frames", 3, "--size", "32x32")


@pytest.fixture(scope="session")
def tiny_clips(tmp_path_factory):
    """A diffusers folder with a randomly initialised AnimateDiff."""
    folder = tmp_path_factory.mktemp("models") / "tiny-animatediff"
    with quiet():
        tiny_pipeline("animatediff").save_pretrained(folder)
    return folder


def test_a_named_file_holds_the_clip_of_the_loop_and_repeats(sfumato, tiny_clips):
    made = sfumato("make", "a red cube", "--model", tiny_clips, *FAST, "--seed", 5, "--fps", 4, "-o", "here/x.webp")
    assert (made.code, made.lines) == (0, ["here/x.webp"]), made.err
    result = generate(load(tiny_clips), "a red cube", steps=1, frames=3, size=(32, 32), seed=5)
    frames, fps = clips.read_clip("here/x.webp")
    assert np.array_equal(frames, result.clips[0]) and fps == pytest.approx(4)
    recipe, exact = files.read_recipe("here/x.webp")
    assert exact and (recipe["frames"], recipe["fps"], recipe["seed"]) == (3, 4, 5)
    again = sfumato("make", "--like", "here/x.webp", "--model", tiny_clips, "-o", "again.webp")
    assert again.code == 0, again.err
    with open("here/x.webp", "rb") as one, open("again.webp", "rb") as two:
        assert one.read() == two.read()


def test_every_format_can_be_repeated(sfumato, tiny_clips):
    for suffix in (".mp4", ".gif"):
        made = sfumato("make", "a red cube", "--model", tiny_clips, *FAST, "-o", f"x{suffix}")
        assert made.code == 0, made.err
        again = sfumato("make", "--like", f"x{suffix}", "--model", tiny_clips, "-o", f"y{suffix}")
        assert again.code == 0, again.err
        with open(f"x{suffix}", "rb") as one, open(f"y{suffix}", "rb") as two:
            assert one.read() == two.read()


def test_in_a_folder_clips_are_mp4_with_their_sheets_beside(sfumato, tiny_clips):
    words = "daam:words=[cube]"
    made = sfumato("make", "a red cube", "-n", 2, "--model", tiny_clips, *FAST, "--with", words, "-o", "here")
    assert made.code == 0, made.err
    assert made.lines == [f"here/a-red-cube-{i}{end}" for i in (0, 1) for end in (".mp4", ".heat.png")]
    with Image.open("here/a-red-cube-0.heat.png") as sheet:
        assert sheet.width > 3 * 256 and sheet.height > 2 * 256
    numbered = sfumato("make", "a red cube", "-n", 2, "--model", tiny_clips, *FAST, "--grid", "-o", "two.gif")
    assert numbered.lines == ["two-1.gif", "two-2.gif", "two-1-grid-of-2.png"], numbered.err
    with Image.open("two-1-grid-of-2.png") as grid:
        assert grid.size == (3 * 32 + 2 * 2, 2 * 32 + 2)  # a strip of each


def test_what_does_not_fit_is_refused(sfumato, tiny_clips, tiny_sd):
    for options, told in (
        (("make", "a cube", "--model", tiny_clips, *FAST, "-o", "x.png"), "makes clips, so 'x.png' must end in .mp4"),
        (("make", "a cube", "--model", tiny_sd, "--steps", 1, "-o", "x.mp4"), "makes pictures, so 'x.mp4' must end"),
        (("make", "a cube", "--model", tiny_sd, "--steps", 1, "--frames", 4), "makes pictures, not clips"),
        (("make", "a cube", "--model", tiny_sd, "--steps", 1, "--fps", 4), "makes pictures, not clips"),
        (("make", "a cube", "--model", tiny_clips, "--frames", 9), "frames=9 does not fit .*: give 1 to 8"),
        (("make", "a cube", "--model", tiny_clips, "--frames", 0), "frames"),
    ):
        outcome = sfumato(*options)
        assert outcome.code == 2, options
        assert re.search(told, " ".join(outcome.err.split())), outcome.err
    assert os.listdir() == []
    made = sfumato("make", "a cube", "--model", tiny_sd, "--steps", 1, "-o", "one.png")
    assert made.lines == ["one.png"]


def test_a_clip_can_be_explained_and_begun_with(sfumato, tiny_clips, tiny_sd):
    made = sfumato("make", "a red cube", "--model", tiny_clips, *FAST, "-o", "x.mp4")
    assert made.code == 0, made.err
    found = sfumato("explain", "x.mp4", "--words", "cube", "--model", tiny_clips, "--steps", 1, "-o", "heat")
    assert (found.code, found.lines) == (0, ["heat/x.heat.png"]), found.err
    with Image.open("heat/x.heat.png") as sheet:
        assert sheet.width > 3 * 256 and sheet.height > 2 * 256
    begun = sfumato(
        *(
            "make",
            "a blue ball",
            "--image",
            "x.mp4",
            "--strength",
            1,
            "--model",
            tiny_clips,
            "--steps",
            1,
            "-o",
            "y.gif",
        )
    )
    assert begun.code == 0, begun.err
    assert clips.read_clip("y.gif")[0].shape == (3, 32, 32, 3)
    for command in (("make", "a cube", "--image", "x.mp4", "--steps", 1), ("explain", "x.mp4")):
        outcome = sfumato(*command, "--model", tiny_sd)
        assert outcome.code == 2 and "is a clip, but" in outcome.err


def test_a_file_of_prompts_makes_clips(sfumato, tiny_clips):
    with open("prompts.jsonl", "w", encoding="utf-8") as file:
        file.write('{"prompt": "a red cube"}\n{"prompt": "a dog", "seed": 3}\n')
    given = ("make", "--prompts", "prompts.jsonl", "--model", tiny_clips, *FAST, "-o", "here")
    made = sfumato(*given)
    assert (made.code, made.lines) == (0, ["here/a-red-cube-0.mp4", "here/a-dog-3.mp4"]), made.err
    again = sfumato(*given)  # nothing is made twice
    assert (again.code, again.lines) == (0, []), again.err
    assert clips.read_clip("here/a-dog-3.mp4")[0].shape == (3, 32, 32, 3)


def test_every_command_that_draws_takes_the_name_of_a_file(sfumato, tiny_sd):
    made = sfumato("make", "a red cube", "--model", tiny_sd, "--steps", 2, "-o", "here/x.png")
    assert (made.code, made.lines) == (0, ["here/x.png"]), made.err
    found = sfumato("explain", "here/x.png", "--model", tiny_sd, "--steps", 1, "-o", "here/heat.png")
    assert (found.code, found.lines) == (0, ["here/heat.png"]), found.err
    done = sfumato("edit", "here/x.png", "a blue cube", "--model", tiny_sd, "-o", "here/y.png")
    assert done.code == 0 and done.lines[0] == "here/y.png", done.err
    assert sorted(os.listdir("here"))[-2:] == ["x.png", "y.png"] and "heat.png" in os.listdir("here")
