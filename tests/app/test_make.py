"""`sfumato make`: pictures, their recipes, and repeating them bit for bit."""

from __future__ import annotations

import errno
import importlib
import json
import multiprocessing
import os
import resource
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sfumato as package
from sfumato import files
from sfumato.app.cli import app
from sfumato.models import load
from sfumato.sampling import generate

FAST = ("--steps", 3)


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_make_writes_the_pictures_of_the_loop(sfumato, tiny_sd):
    outcome = sfumato(
        "make", "a red cube", "-n", 2, "--model", tiny_sd, *FAST, "--seed", 5, "--guidance", 3, "-o", "here"
    )
    assert outcome.code == 0, outcome.err
    assert outcome.lines == ["here/a-red-cube-5.png", "here/a-red-cube-6.png"]
    result = generate(load(tiny_sd), "a red cube", steps=3, guidance=3.0, seed=[6])
    assert (pixels("here/a-red-cube-6.png") == np.asarray(result.images[0])).all()
    recipe, exact = files.read_recipe("here/a-red-cube-6.png")
    assert exact and (recipe["prompt"], recipe["seed"], recipe["steps"], recipe["guidance"]) == (
        "a red cube",
        6,
        3,
        3.0,
    )
    assert recipe["hash"] == load(tiny_sd).weight_hash and recipe["size"] == [32, 32]


def test_size_negative_scheduler_and_dtype_reach_the_loop(sfumato, tiny_sd):
    done = sfumato(
        *("make", "a cube", "--model", tiny_sd, *FAST, "--size", "48x32", "--negative", "red", "--scheduler", "ddim"),
        *("--dtype", "bfloat16"),
    )
    assert done.code == 0, done.err
    recipe, _ = files.read_recipe(done.lines[0])
    told = {name: recipe[name] for name in ("size", "negative", "scheduler", "dtype")}
    assert told == {"size": [48, 32], "negative": "red", "scheduler": "ddim", "dtype": "bfloat16"}
    assert Image.open(done.lines[0]).size == (48, 32)


@pytest.mark.parametrize(
    "options",
    [
        ("--scheduler", "euler_a", "--seed", 3),
        ("--negative", "blue, dark", "--guidance", 5.5, "--size", "48x32"),
        ("--dtype", "bfloat16", "-n", 2),
    ],
)
def test_like_gives_the_identical_picture(sfumato, tiny_sd, options):
    made = sfumato("make", "two toys: red & 红", "--model", tiny_sd, *FAST, *options)
    assert made.code == 0, made.err
    again = sfumato("make", "--like", made.lines[-1], "--model", tiny_sd)
    assert again.code == 0 and again.err == ""
    assert again.lines[0] != made.lines[-1]
    assert Path(again.lines[0]).read_bytes() == Path(made.lines[-1]).read_bytes()


def test_the_models_of_these_tests_are_read_once(sfumato, tiny_sd, loaded_once, monkeypatch):
    """Or each of some hundred commands would read one for itself."""
    assert sfumato("make", "a cube", "--model", tiny_sd, *FAST).code == 0 and str(tiny_sd) in loaded_once
    reading = importlib.import_module("sfumato.models.load")
    monkeypatch.setattr(reading, "load_folder", lambda *_: pytest.fail("read again"))
    assert sfumato("make", "a ball", "--model", tiny_sd, *FAST).code == 0


@pytest.mark.parametrize("name", ["toy-sd", "toy-sd3"])
def test_built_in_models_need_no_option(sfumato, name):
    model = () if name == "toy-sd" else ("--model", name)
    made = sfumato("make", "a red cube and a blue ball", *model, "--steps", 3, "--with", "daam")
    assert made.code == 0 and made.err == "", made.err
    assert [Path(line).name for line in made.lines] == [
        "a-red-cube-and-a-blue-ball-0.png",
        "a-red-cube-and-a-blue-ball-0.heat.png",
    ]
    again = sfumato("make", "--like", made.lines[0])
    assert again.code == 0 and again.err == "", again.err
    assert [Path(line).read_bytes() for line in again.lines] == [Path(line).read_bytes() for line in made.lines]


def test_like_begins_from_the_same_picture_again(sfumato, tiny_sd):
    Image.new("RGB", (32, 32), "red").save("red.png")
    made = sfumato("make", "a cube", "--model", tiny_sd, *FAST, "--image", "red.png", "--strength", 0.7)
    assert made.code == 0, made.err
    again = sfumato("make", "--like", made.lines[0], "--model", tiny_sd, "--image", "red.png")
    assert pixels(again.lines[0]).tobytes() == pixels(made.lines[0]).tobytes()


def test_like_with_an_option_changes_that_option_only(sfumato, tiny_sd):
    made = sfumato("make", "a cube", "--model", tiny_sd, *FAST, "--guidance", 2)
    again = sfumato("make", "--like", made.lines[0], "--model", tiny_sd, "--seed", 9)
    recipe, _ = files.read_recipe(again.lines[0])
    assert (recipe["seed"], recipe["guidance"], recipe["steps"]) == (9, 2.0, 3)


def test_like_warns_of_other_weights_and_versions(sfumato, tiny_sd):
    made = sfumato("make", "a cube", "--model", tiny_sd, *FAST)
    recipe, _ = files.read_recipe(made.lines[0])
    recipe |= {"hash": "0" * 64, "versions": {**recipe["versions"], "torch": "1.0.0"}}
    files.save_png("other.png", Image.open(made.lines[0]), recipe)
    outcome = sfumato("make", "--like", "other.png", "--model", tiny_sd)
    assert outcome.code == 0
    first, second = outcome.err.splitlines()
    assert "warning: other weights" in first and "will differ" in first
    assert "torch is" in second and "was 1.0.0 then" in second


def test_like_reads_the_text_of_other_programs(sfumato, tiny_sd):
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    chunks.add_text("parameters", "a red cube\nSteps: 2, Sampler: DDIM, CFG scale: 3, Seed: 11, Size: 32x32")
    Image.new("RGB", (32, 32)).save("a1111.png", pnginfo=chunks)
    outcome = sfumato("make", "--like", "a1111.png", "--model", tiny_sd)
    assert outcome.code == 0 and "will not be the same" in outcome.err
    recipe, _ = files.read_recipe(outcome.lines[0])
    assert (recipe["seed"], recipe["steps"], recipe["scheduler"]) == (11, 2, "ddim")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"steps": 0}, ["cannot be followed", "steps of make is 0"]),
        ({"steps": "rm -rf"}, ["cannot be followed", "steps of make"]),
        ({"seed": [1, 2]}, ["cannot be followed", "seed"]),
        ({"size": [10**9, 10**9]}, ["cannot be followed", "size"]),
        ({"prompt": "word " * 5000}, ["cannot be followed", "5000 words"]),
        ({"prompt": None}, ["cannot be followed", "prompt"]),
        ({"with": [{"method": "os.system", "params": {}}]}, ["cannot be followed", "unknown method 'os.system'"]),
        ({"with": "daam"}, ["cannot be followed", "list of systems is damaged"]),
        ({"with": [3]}, ["cannot be followed", "list of systems is damaged"]),
        ({"with": [{"method": "daam", "params": [1]}]}, ["cannot be followed", "describes no system"]),
        ({"with": [{"method": ["daam"]}]}, ["cannot be followed", "describes no system"]),
        ({"latents": "ab"}, ["latents that a program gave"]),
        ({"image": "ab"}, ["--image must agree"]),
        ({"compose": [["a", "b"]]}, ["cannot be followed", "compose"]),
    ],
)
def test_like_trusts_nothing(refused, tmp_path, tiny_sd, change, says):
    recipe = {"prompt": "a cube", "seed": 1, "steps": 2, "model": "toy-sd", "hash": "", "with": []} | change
    picture = files.save_png(tmp_path / "strange.png", Image.new("RGB", (8, 8)), recipe)
    refused("make", "--like", picture, "--model", tiny_sd, says=says)


def test_like_loads_no_model_that_only_a_picture_names(refused, tmp_path):
    recipe = {"prompt": "a cube", "model": "somebody/weights", "hash": ""}
    picture = files.save_png(tmp_path / "strange.png", Image.new("RGB", (8, 8)), recipe)
    says = ["'somebody/weights', which is neither built in nor here", "say --model yourself"]
    refused("make", "--like", picture, says=says)


def test_like_finds_a_folder_of_ones_own_again(sfumato, refused, tiny_sd, loaded_once, tmp_path):
    made = sfumato("make", "a cube", "--model", tiny_sd, *FAST).lines[0]
    again = sfumato("make", "--like", made, "-o", "again.png")
    assert again.lines == ["again.png"] and (pixels("again.png") == pixels(made)).all()
    recipe = files.read_recipe(made)[0]
    other = files.save_png(tmp_path / "other.png", Image.new("RGB", (8, 8)), {**recipe, "hash": "ab" * 32})
    refused("make", "--like", other, says=["other weights of", "--model", "all the same"])
    for model in (str(tmp_path), f"{tiny_sd}/vae", "~nobody/x", "x" * 5000, "/dev/zero", 3):
        strange = files.save_png(tmp_path / "strange.png", Image.new("RGB", (8, 8)), {**recipe, "model": model})
        refused("make", "--like", strange, says=["neither built in nor here"])


def test_a_folder_named_from_elsewhere_is_found_beside_the_picture(sfumato, refused, tiny_sd, tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    (home / "mine").symlink_to(tiny_sd)
    monkeypatch.chdir(home)
    made = sfumato("make", "a cube", "--model", "mine", "--steps", 1, "-o", "drawn/here").lines[0]
    picture = home / made
    monkeypatch.chdir(tmp_path)
    again = sfumato("make", "--like", picture, "-o", "again.png")
    assert again.lines == ["again.png"] and (pixels("again.png") == pixels(picture)).all()
    assert files.read_recipe(picture)[0]["model"] == "mine"
    edited = sfumato("edit", picture, "a ball", "-o", "edit.png").lines
    assert edited and edited[0] == "edit.png"
    moved = picture.rename(tmp_path / "moved.png")
    refused("make", "--like", moved, says=["'mine'", "neither built in nor here"])


def test_prompts_from_a_file(sfumato, tiny_sd):
    Path("many.jsonl").write_text('{"prompt": "a cube", "seed": 4}\n\n{"prompt": "a ball", "n": 2}\n', encoding="utf-8")
    outcome = sfumato("make", "--prompts", "many.jsonl", "--model", tiny_sd, *FAST, "--grid")
    assert outcome.lines == [
        "out/a-cube-4.png",
        "out/a-ball-0.png",
        "out/a-ball-1.png",
        "out/a-cube-4-grid-of-3.png",
    ]
    grid = pixels(outcome.lines[3])
    assert grid.shape == (66, 66, 3) and (grid[:32, 34:] == pixels("out/a-ball-0.png")).all()


MANY = """{"prompt": "a cube", "seed": 4, "task": "one"}
{"prompt": "a ball", "n": 3}
{"prompt": "a cube", "seed": 4}
{"prompt": "a cube", "seed": 4}
"""


def _many(sfumato, tiny_sd, out):
    Path("many.jsonl").write_text(MANY, encoding="utf-8")
    return sfumato("make", "--prompts", "many.jsonl", "--model", tiny_sd, "--steps", 1, "-o", out)


def test_prompts_leave_an_imagefolder(sfumato, tiny_sd):
    done = _many(sfumato, tiny_sd, "out")
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in Path("out/metadata.jsonl").read_text().splitlines()]
    assert [f"out/{row['file_name']}" for row in rows] == done.lines and len(rows) == 6
    assert [row["text"] for row in rows[:2]] == ["a cube", "a ball"] and rows[0]["task"] == "one"
    assert all(row["cost"] > 0 and row["seconds"] > 0 for row in rows)
    assert (pixels("out/a-cube-4.png") == pixels("out/a-cube-4-3.png")).all()


@pytest.mark.parametrize(("stop", "torn"), [(1, False), (4, True)])
def test_prompts_go_on_after_a_kill(sfumato, tiny_sd, monkeypatch, stop, torn):
    whole = _many(sfumato, tiny_sd, "whole")
    with monkeypatch.context() as patched:
        _fail_at_picture(patched, stop, KeyboardInterrupt())
        outcome = _many(sfumato, tiny_sd, "out")
        assert outcome.code == 130 and f"{stop - 1} finished pictures are in out" in outcome.err
        assert len(outcome.lines) == stop - 1
    if torn:  # a kill in the middle of a line
        with open("out/metadata.jsonl", "a") as file:
            file.write('{"file_name": "x.p')
    again = _many(sfumato, tiny_sd, "out")
    assert again.code == 0 and len(again.lines) == 7 - stop
    assert again.err == (f"{stop - 1} pictures were there already.\n" if stop > 1 else "")
    kept = sorted(os.listdir("out"))
    assert kept == sorted(os.listdir("whole")) and len(whole.lines) == 6
    for name in kept:
        if name.endswith(".png"):
            assert (pixels(f"out/{name}") == pixels(f"whole/{name}")).all()
    assert not _many(sfumato, tiny_sd, "out").lines  # now all is there


def test_other_settings_are_other_pictures(sfumato, tiny_sd):
    Path("one.jsonl").write_text('{"prompt": "a cube"}\n')
    make = ("make", "--prompts", "one.jsonl", "--model", tiny_sd)
    assert sfumato(*make, "--steps", 1).lines == ["out/a-cube-0.png"]
    assert sfumato(*make, "--steps", 2).lines == ["out/a-cube-0-2.png"]
    assert sfumato(*make, "--steps", 2, "--with", "daam:words=cube").lines[0] == "out/a-cube-0-3.png"
    assert sfumato(*make, "--steps", 1).lines == []
    Path("out/a-cube-0.png").unlink()  # taken away: made again in its place
    assert sfumato(*make, "--steps", 1).lines == ["out/a-cube-0.png"]
    Path("out/metadata.jsonl").write_text("damage\n")
    damaged = sfumato(*make, "--steps", 1)
    assert damaged.code == 2 and "metadata.jsonl, line 1 is damaged" in damaged.err


def test_pictures_are_never_overwritten(sfumato, tiny_sd):
    first = sfumato("make", "a cube", "--model", tiny_sd, *FAST).lines
    second = sfumato("make", "a cube", "--model", tiny_sd, "--steps", 2).lines
    assert (first, second) == (["out/a-cube-0.png"], ["out/a-cube-0-2.png"])


def test_any_text_is_a_prompt(sfumato, tiny_sd):
    for prompt in (
        "🧊🔴 ❤️‍🔥",
        "كرة حمراء",
        "a\u0301\u0302 combining",
        "(cube:1.3) [ball",
        "--debug-like words",
        "x" * 300,
    ):
        outcome = sfumato("make", "--model", tiny_sd, "--steps", 1, "--", prompt)
        assert outcome.code == 0, outcome.err
        assert files.read_recipe(outcome.lines[0])[0]["prompt"] == prompt


def test_a_prompt_longer_than_the_context_is_said_loudly(sfumato, tiny_sd):
    outcome = sfumato(
        "make", "red cube " * 100 + "lighthouse", "--model", tiny_sd, "--steps", 1, "--long-prompts", "cut"
    )
    assert outcome.code == 0
    assert outcome.err.startswith("warning: ") and "does not see" in outcome.err and outcome.err.count("\n") == 1


def test_a_terminal_is_not_needed_and_nothing_else_is_printed(sfumato, tiny_sd):
    outcome = sfumato("make", "a cube", "--model", tiny_sd, *FAST)
    assert (outcome.out, outcome.err) == ("out/a-cube-0.png\n", "")


# --- failures in the middle ------------------------------------------------------------------------------


def _fail_at_picture(monkeypatch, count, error):
    save, calls = files.save_png, []

    def failing(path, *args, **more):
        calls.append(path)
        if len(calls) == count:
            raise error
        return save(path, *args)

    monkeypatch.setattr(files, "save_png", failing)


def test_a_disk_that_fills_up_keeps_finished_pictures(sfumato, tiny_sd, monkeypatch):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/a-cube-1.png")
    _fail_at_picture(monkeypatch, 2, full)
    outcome = sfumato("make", "a cube", "-n", 3, "--model", tiny_sd, *FAST)
    assert outcome.code == 2 and outcome.lines == ["out/a-cube-0.png"] and os.listdir("out") == ["a-cube-0.png"]
    assert (
        outcome.err == "error: out/a-cube-1.png: No space left on device; free some space or write elsewhere with -o.\n"
    )


def test_ctrl_c_keeps_finished_pictures(sfumato, tiny_sd, monkeypatch):
    _fail_at_picture(monkeypatch, 3, KeyboardInterrupt())
    outcome = sfumato("make", "a cube", "-n", 5, "--model", tiny_sd, *FAST)
    assert outcome.code == 130 and sorted(os.listdir("out")) == ["a-cube-0.png", "a-cube-1.png"]
    assert outcome.err == "error: interrupted; 2 finished pictures are in out, nothing half-written is left.\n"


def _limited_then_interrupted(out: int, err: int, folder: Path, model: Path) -> None:
    """Files may not grow beyond 2 kB; then, without that limit, pictures without end."""
    os.dup2(out, 1)
    os.dup2(err, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored

    def make(where: str, n: int) -> int:
        with pytest.raises(SystemExit) as left:
            app(["make", "a cube", "-n", str(n), "--model", str(model), "--steps", "2", "-o", where])
        return left.value.code

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    print("limited", make("limited", 1), flush=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    sys.exit(make("interrupted", 100000))


def test_a_real_disk_limit_and_a_real_interrupt(tmp_path, tiny_sd):
    """In a process of its own, which has the libraries from this one."""
    (out, out_end), (err, err_end) = os.pipe(), os.pipe()
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=_limited_then_interrupted, args=(out_end, err_end, tmp_path, tiny_sd))
    process.start()
    os.close(out_end)
    os.close(err_end)
    with os.fdopen(out) as said, os.fdopen(err) as errors:
        assert said.readline() == "limited 2\n"
        for _ in range(2):
            assert said.readline().startswith("interrupted/a-cube-")
        os.kill(process.pid, signal.SIGINT)
        said.read()
        limited, interrupted = errors.read().splitlines()
    process.join(300)
    assert limited.startswith("error: limited/a-cube-0.png: File too large; ")
    assert process.exitcode == 130 and interrupted.startswith("error: interrupted; ")
    kept = sorted((tmp_path / "interrupted").iterdir())
    assert f"{len(kept)} finished pictures are in interrupted" in interrupted
    assert not (tmp_path / "limited").exists() and all(files.read_recipe(path)[1] for path in kept)


# --- the Python face --------------------------------------------------------------------------------------------------


def test_the_python_face_makes_the_same(sfumato, tiny_sd):
    line = sfumato("make", "a cube", "--model", tiny_sd, *FAST, "--seed", 2).lines[0]
    result = package.make("a cube", model=tiny_sd, steps=3, seed=2)
    assert (np.asarray(result.images[0]) == pixels(line)).all()
    assert json.dumps(result.recipe, sort_keys=True) == json.dumps(files.read_recipe(line)[0], sort_keys=True)
