"""`sfumato explain`: heat maps beside pictures that are made, and for pictures that exist."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sfumato as package
from sfumato import app, files
from sfumato.explain.heatmaps import HeatMaps
from sfumato.models import load
from sfumato.sampling import generate

PROMPT = "a red cube and a blue ball"


def test_a_prompt_is_made_and_explained(sfumato, tiny_sd):
    done = sfumato("explain", PROMPT, "--words", "red cube|ball", "--model", tiny_sd, "--steps", 2, "--maps", "-n", 2)
    assert done.code == 0, done.err
    stem = "out/a-red-cube-and-a-blue-ball"
    assert done.lines == [
        f"{stem}-{seed}{suffix}" for seed in (0, 1) for suffix in (".png", ".heat.png", ".daam.safetensors")
    ]
    plain = generate(load(tiny_sd), PROMPT, steps=2, seed=[1])
    assert np.asarray(Image.open(f"{stem}-1.png")).tobytes() == np.asarray(plain.images[0]).tobytes()
    maps = HeatMaps.load(f"{stem}-1.daam.safetensors")
    assert maps.words == ("red cube", "ball") and maps.prompt == PROMPT and maps.facts["seed"] == 1


def test_make_with_daam_draws_the_same(sfumato, tiny_sd):
    explained = sfumato("explain", PROMPT, "--words", "ball", "--model", tiny_sd, "--steps", 2, "-o", "one").lines
    made = sfumato("make", PROMPT, "--with", "daam:words=ball", "--model", tiny_sd, "--steps", 2, "-o", "two").lines
    assert [Path(path).name for path in explained] == [Path(path).name for path in made]
    assert all(Path(a).read_bytes() == Path(b).read_bytes() for a, b in zip(explained, made, strict=True))
    again = sfumato("make", "--like", made[0], "--model", tiny_sd, "-o", "three").lines
    assert Path(again[1]).read_bytes() == Path(made[1]).read_bytes()


def test_a_picture_that_exists(sfumato, tiny_sd):
    Image.fromarray(np.full((40, 80, 3), 90, np.uint8)).save("photo.jpg")
    done = sfumato("explain", "photo.jpg", "--prompt", PROMPT, "--model", tiny_sd, "--steps", 3, "--maps", "--seed", 4)
    assert done.code == 0, done.err
    assert done.lines == ["out/photo.heat.png", "out/photo.heat.safetensors"]
    maps = HeatMaps.load(done.lines[1])
    width, height = app.fitting_size(load(tiny_sd), (80, 40))
    assert maps.size == (height, width)
    assert [label.split("#")[0] for label in maps.words] == PROMPT.split()
    found = package.explain(files.read_picture("photo.jpg"), PROMPT, model=tiny_sd, steps=3, seed=4).maps[0]
    assert torch.equal(found.map("cube"), maps.map("cube"))


def test_a_picture_of_ours_brings_its_prompt(sfumato, tiny_sd):
    made = sfumato("make", PROMPT, "--model", tiny_sd, "--steps", 1).lines[0]
    done = sfumato("explain", made, "--model", tiny_sd, "--steps", 2, "--words", "blue ball")
    assert done.code == 0, done.err
    assert files.read_recipe(done.lines[0])[0]["prompt"] == PROMPT


@pytest.mark.parametrize(("size", "fits"), [((64, 64), (32, 32)), ((1000, 500), (48, 24)), ((9, 2000), (8, 88))])
def test_pictures_are_brought_to_the_area_the_model_knows(tiny_sd, size, fits):
    model = load(tiny_sd)
    assert (model.default_size, model.size_multiple) == ((32, 32), 8)
    assert app.fitting_size(model, size) == fits


def test_the_python_face(tiny_sd):
    explained = package.explain(PROMPT, words="ball", model=tiny_sd, steps=2, seed=[3, 5], n=2)
    assert len(explained.images) == len(explained.maps) == 2 and explained.result.seeds == [3, 5]
    assert explained.maps[0].map("ball").shape == (32, 32)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((PROMPT, "--words", "cubes"), ["'cubes' is not in the prompt", "'cube'"]),
        ((PROMPT, "--by", "damm"), ["unknown method 'damm'", "'daam'"]),
        ((PROMPT, "--by", "daam:heads=[99]"), ["heads"]),
        ((PROMPT, "--by", "daam:layers=[nowhere]"), ["nowhere", "down"]),
        (("", "--words", "cube"), ["prompt", "must say something"]),
        (("missing.png",), ["missing.png", "No such file"]),
        (("plain.png",), ["carries no recipe", "--prompt"]),
        (("plain.png", "--prompt", ""), ["must say something"]),
        (("plain.png", "--prompt", PROMPT, "--words", "dog"), ["'dog' is not in the prompt"]),
        (("plain.png", "--prompt", PROMPT, "-n", 2), ["-n cannot be given"]),
        (("plain.png", "--prompt", PROMPT, "--guidance", 2), ["--guidance cannot be given"]),
        (("plain.png", "--prompt", PROMPT, "--steps", 0), ["steps"]),
        (("plain.png", "--prompt", PROMPT, "--seed=-4"), ["seed"]),
        (("plain.png", "--prompt", PROMPT, "--size", "33x31"), ["33x31"]),
        (("text.png", "--prompt", PROMPT), ["cannot be read as a picture"]),
    ],
)
def test_what_cannot_be_explained(refused, tmp_path, tiny_sd, args, says):
    Image.new("RGB", (32, 32)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("no picture")
    steps = () if "--steps" in args else ("--steps", 2)
    refused("explain", *args, *steps, "--model", tiny_sd, says=says)


def test_a_net_is_explained(sfumato, tiny_sd):
    done = sfumato("explain", tiny_sd, "--by", "shape_texture:pairs=4,draws=3,layers=[mid_block|down_blocks.0]")
    assert done.code == 0, done.err
    assert done.lines[0].startswith("mid_block: ") and done.lines[1].startswith("down_blocks.0: ")
    assert done.lines[2:] == ["out/tiny-sd.shape_texture.json", "out/tiny-sd.shape_texture.png"]
    told = json.loads(Path(done.lines[2]).read_text())
    assert list(told["layers"]) == ["mid_block", "down_blocks.0"]
    assert Image.open(done.lines[3]).width > 200


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("{net}", "--by", "shape_texture:pairs=2"), ["pairs of shape_texture is '2'"]),
        (("{net}", "--by", "shape_texture:factors=[shapes]"), ["unknown factor of shape_texture 'shapes'", "'shape'"]),
        (("{net}", "--by", "shape_texture:pairs=3,layers=[mid]"), ["unknown layer 'mid'", "'mid_block'"]),
        (("no-net", "--by", "shape_texture"), ["no-net"]),
        (("{net}", "--by", "shape_texture", "--words", "cube"), ["explains a net"]),
        (("{net}", "--by", "shape_texture", "--steps", 3), ["explains a net"]),
    ],
)
def test_a_net_cannot_be_explained(refused, tiny_sd, args, says):
    refused("explain", *[str(arg).format(net=tiny_sd) for arg in args], says=says)
