"""Options that one command has are where else they mean something."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from PIL import Image

from sfumato import app, checkpoints, files
from sfumato.bench.report import Report

PROMPT = "a red cube and a blue ball"


def test_explain_takes_systems_beside_the_one_that_looks(sfumato, tiny_sd):
    beside = "structured_guidance"
    given = ("--model", tiny_sd, "--steps", 2)
    explained = sfumato("explain", PROMPT, "--with", beside, *given, "-o", "one")
    assert explained.code == 0, explained.err
    made = sfumato("make", PROMPT, "--with", "daam", "--with", beside, *given, "-o", "two")
    assert [Path(a).read_bytes() == Path(b).read_bytes() for a, b in zip(explained.lines, made.lines, strict=True)]
    plain = sfumato("explain", PROMPT, *given, "-o", "three").lines[0]
    assert Path(plain).read_bytes() != Path(explained.lines[0]).read_bytes()
    refused = sfumato("explain", explained.lines[0], "--with", beside, *given)
    assert refused.code == 2 and "--with cannot be given for a picture that exists" in refused.err


def test_edit_takes_a_scheduler_where_a_region_is_drawn_anew(sfumato, tiny_sd):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save("photo.png")
    Image.fromarray(np.full((32, 32), 255, np.uint8)).save("mask.png")
    given = ("edit", "photo.png", "a ball", "--by", "blend", "--mask", "mask.png", "--model", tiny_sd, "--steps", 2)
    found = {}
    for name in ("ddim", "euler"):
        done = sfumato(*given, "--scheduler", name, "-o", f"{name}.png")
        assert done.code == 0, done.err
        found[name] = (files.read_recipe(f"{name}.png")[0]["scheduler"], Path(f"{name}.png").read_bytes())
    assert [found[name][0] for name in ("ddim", "euler")] == ["ddim", "euler"]
    assert found["ddim"][1] != found["euler"][1]
    alone = sfumato("edit", "photo.png", "a ball", "--from", "a cube", "--model", tiny_sd, "--scheduler", "euler")
    assert alone.code == 2 and "scheduler cannot be given to prompt_to_prompt" in alone.err


def test_strength_is_how_much_is_drawn_anew(sfumato, tiny_sd):
    """One meaning for make and edit; what a system calls strength itself is said within it."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save("photo.png")
    Image.fromarray(np.full((32, 32), 255, np.uint8)).save("mask.png")
    given = ("--model", tiny_sd, "--steps", 4, "--size", "32x32")
    for share in (0.5, 1.0):
        edited = sfumato("edit", "photo.png", "a ball", "--by", "blend", "--mask", "mask.png", *given,
                         "--strength", share, "-o", "edited.png")  # fmt: skip
        made = sfumato("make", "a ball", "--image", "photo.png", "--with", "blend:mask=mask.png", *given,
                       "--strength", share, "-o", "made.png")  # fmt: skip
        assert edited.code == made.code == 0, (edited.err, made.err)
        assert Image.open("edited.png").tobytes() == Image.open("made.png").tobytes()
    kept = sfumato("edit", "photo.png", "--like", "edited.png", "--mask", "mask.png", "--model", tiny_sd, "-o", "b.png")
    assert kept.code == 0 and Image.open("b.png").tobytes() == Image.open("edited.png").tobytes(), kept.err
    plain = sfumato("edit", "photo.png", "a ball", "--by", "blend", "--mask", "mask.png", *given, "-o", "plain.png")
    assert Image.open("plain.png").tobytes() == Image.open("made.png").tobytes(), plain.err  # 1 if nothing is said
    words = ("edit", "photo.png", "a ball", "--from", "a cube", "--model", tiny_sd, "--steps", 2, "--inner", 0)
    refused = sfumato(*words, "--strength", 0.5)
    assert refused.code == 2 and "strength cannot be given to prompt_to_prompt" in refused.err
    remedy = re.search(r"for its own strength write (\S+)=", refused.err)[1]
    done = sfumato(*words, "--by", f"{remedy}=0.5", "-o", "c.png")
    assert done.code == 0, done.err
    recipe = files.read_recipe("c.png")[0]
    assert recipe["edit"]["with"][0]["params"]["strength"] == 0.5 and "strength" not in recipe["edit"]["options"]


def test_devices_of_training(sfumato):
    for device, says in (("cuda:1", "CUDA_VISIBLE_DEVICES"), ("abacus", "takes 'cpu' or 'cuda'")):
        done = sfumato("train", "toy-cnn", "--device", device)
        assert done.code == 2 and says in done.err
    done = sfumato("teach", "toybox", "--by", "robust_vit", "--device", "cuda", "-o", "taught")
    assert done.code == 2 and "leave dtype, device and config out" in done.err
    Path("photos").mkdir()
    done = sfumato("teach", "photos", "--name", "<rex>", "--device", "abacus", "-o", "rex.safetensors")
    assert done.code == 2 and "abacus" in done.err


def test_real_pictures_by_their_earlier_name(sfumato, monkeypatch):
    """``--reference`` of make is a picture to draw by; judge and compare take ``--real``."""
    found = []

    def judge(folder, real, **_):
        found.append(real)
        return Report("nothing", [])

    def compare(*_, reference, **__):
        return judge("", reference)

    monkeypatch.setattr("sfumato.app.judge", judge)
    monkeypatch.setattr("sfumato.app.compare", compare)
    for command in (("judge", "a"), ("compare", "a", "b")):
        now, then = (sfumato(*command, option, "true") for option in ("--real", "--reference"))
        assert now.code == then.code == 0, (now.err, then.err)
        assert found == [Path("true")] * 2 and "called" not in now.err
        assert "--reference is called --real here: --real true" in then.err
        found.clear()


def test_a_model_is_looked_up_once(tiny_sd, monkeypatch):
    asked = []
    find = checkpoints.find
    monkeypatch.setattr(checkpoints, "find", lambda name, *rest: asked.append(name) or find(name, *rest))
    app.JobBatch([app.JobOptions(prompt=PROMPT, size=(32, 32))], str(tiny_sd)).load()
    assert asked == [str(tiny_sd)]
    asked.clear()
    app.make(PROMPT, model=str(tiny_sd), size=(32, 32), steps=1)
    assert asked == [str(tiny_sd)]


def test_the_end_of_a_file_is_no_interruption(sfumato, monkeypatch):
    """The parser of commands takes EOFError for Ctrl-D at a prompt; nobody is asked anything."""

    def ends(*_, **__):
        raise EOFError("compressed file ended early")

    monkeypatch.setattr("sfumato.app.make_files", ends)
    done = sfumato("make", PROMPT)
    assert done.code == 1 and "unexpected EOFError: compressed file ended early" in done.err
