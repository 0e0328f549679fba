"""`sfumato make --reference`: pictures to draw by."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sfumato as package
from sfumato import files
from sfumato.models import load
from sfumato.models.quiet import quiet
from tests.tiny import tiny_model, tiny_pipeline

FAST = ("--steps", 1, "--guidance", 1)


@pytest.fixture(scope="module")
def klein(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny-klein"
    with quiet():
        tiny_pipeline("klein").save_pretrained(folder)
    (folder / "sfumato.json").write_text(json.dumps(tiny_model("klein").card))
    return folder


@pytest.fixture
def two(tmp_path, monkeypatch):
    """Two pictures, one wide and one high, in the folder in which the command runs."""
    pictures = [Image.radial_gradient("L").resize(size).convert("RGB") for size in ((48, 24), (20, 40))]
    for name, picture in zip(("wide.png", "high.png"), pictures, strict=True):
        picture.save(tmp_path / name)
    return pictures


def test_pictures_to_draw_by(sfumato, refused, klein, two, tiny_sd):
    given = ("--reference", "wide.png", "--reference", "high.png")
    made = sfumato("make", "a red cube", "--model", klein, *FAST, *given, "--seed", 4, "-o", "x.png")
    assert made.code == 0, made.err
    own = package.make("a red cube", model=load(klein), steps=1, guidance=1, reference=two, seed=4)
    assert own.request.size == (44, 24)  # about the model's own area, in the shape of the first
    assert np.array_equal(np.asarray(files.read_picture("x.png")), np.asarray(own.images[0]))
    again = sfumato("make", "--like", "x.png", "--model", klein, *given, "-o", "y.png")
    assert again.code == 0, again.err
    with open("x.png", "rb") as one, open("y.png", "rb") as other:
        assert one.read() == other.read()
    refused("make", "--like", "x.png", "--model", klein, says=["made with 2 reference pictures", "--reference"])
    refused("make", "a", "--model", tiny_sd, *given, says=["reference is given", "looks at no pictures"])


def test_prompts_of_a_file_share_them(sfumato, klein, two):
    with open("list.jsonl", "w") as file:
        file.write('{"prompt": "a red cube"}\n')
    command = ("make", "--prompts", "list.jsonl", "--model", klein, *FAST, "--reference", "high.png", "-o", "out")
    for _ in range(2):  # the second time it is there already
        made = sfumato(*command)
        assert made.code == 0, made.err
    own = package.make("a red cube", model=load(klein), steps=1, guidance=1, reference=two[1])
    assert np.array_equal(np.asarray(files.read_picture("out/a-red-cube-0.png")), np.asarray(own.images[0]))
    assert len(list(Path("out").glob("*.png"))) == 1
