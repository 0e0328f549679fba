"""`sfumato edit` by an inpainting model, and `sfumato segment`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sfumato as package
from sfumato import files
from sfumato.app import segmenting
from sfumato.edit.inpaint import Inpaint
from sfumato.models import load
from sfumato.sampling import generate

PROMPT = "a blue ball on a dog"


@pytest.fixture
def photo(sfumato):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save("photo.png")
    mask = np.zeros((32, 32), np.uint8)
    mask[5:19, 8:30] = 255
    Image.fromarray(mask).save("mask.png")
    return "photo.png", mask > 0


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def edit(sfumato, *args):
    done = sfumato("edit", *args)
    assert done.code == 0, done.err
    return done.lines


def test_an_inpainting_model_and_a_mask_draw_the_region_anew(sfumato, tiny_inpaint, photo):
    name, inside = photo
    given = ("--mask", "mask.png", "--model", tiny_inpaint, "--steps", 2)
    one, two = edit(sfumato, name, PROMPT, "a cone", *given, "--seed", 4, "--guidance", 2)
    assert (pixels(one)[~inside] == pixels(name)[~inside]).all()
    assert (pixels(one)[inside] != pixels(two)[inside]).any()
    expected = generate(
        load(tiny_inpaint), PROMPT, image=Image.open(name), strength=1.0, steps=2, seed=4, guidance=2.0,
        interventions=Inpaint(mask="mask.png"),
    )  # fmt: skip
    assert (pixels(one) == np.asarray(expected.images[0])).all()
    named = edit(sfumato, name, PROMPT, *given, "--seed", 4, "--guidance", 2, "--with", "inpaint:hold=no", "-o", "b")[0]
    told = files.read_recipe(named)[0]["edit"]
    assert told["with"][0]["params"]["hold"] is False and told["options"] == {"steps": 2, "guidance": 2.0, "seed": 4}
    again = edit(sfumato, name, "--like", named, "--mask", "mask.png", "--model", tiny_inpaint, "-o", "again")[0]
    assert Path(again).read_bytes() == Path(named).read_bytes()


def test_the_same_in_python_with_other_systems(tiny_inpaint, photo, sfumato):
    model = load(tiny_inpaint)
    done = package.edit(photo[0], PROMPT, mask="mask.png", model=model, with_=["daam:words=ball"], steps=2)
    assert done.results[0].coverage["daam"]["calls"] and done.results[0].coverage["inpaint"]["calls"]
    more = package.edit(done.original, PROMPT, mask="mask.png", model=model, steps=2)
    assert done.images[0].tobytes() == more.images[0].tobytes()
    boxed = package.edit(photo[0], PROMPT, model=model, with_="inpaint:box=0|0|0.5|1", steps=2).images[0]
    assert (np.asarray(boxed)[:, 16:] == pixels(photo[0])[:, 16:]).all()


def test_a_photo_is_cut_to_the_model_and_its_mask_with_it(sfumato, tiny_inpaint):
    rng = np.random.default_rng(1)
    Image.fromarray(rng.integers(0, 255, (90, 60, 3), np.uint8)).save("tall.png")
    mask = np.zeros((90, 60), np.uint8)
    mask[:45] = 255
    Image.fromarray(mask).save("half.png")
    [out] = edit(sfumato, "tall.png", PROMPT, "--mask", "half.png", "--model", tiny_inpaint, "--steps", 1)
    size = Image.open(out).size
    assert size[1] > size[0]
    kept = np.asarray(files.fitted(Image.open("tall.png"), size)).astype(int)
    assert (pixels(out)[size[1] // 2 + 1 :] == kept[size[1] // 2 + 1 :]).all()


def test_what_does_not_fit_is_refused(refused, tiny_sd, tiny_inpaint, photo):
    given = (photo[0], PROMPT, "--model", tiny_inpaint)
    masked = (*given, "--mask", "mask.png")
    refused("edit", *given, "--with", "inpaint", says=["needs a region"])
    refused("edit", *masked, "--from", "a cube", says=["from cannot be given to inpaint", "size, seed"])
    refused("edit", *masked, "--reweight", "ball=2", says=["parameter of inpaint 'reweight'"])
    refused("edit", *masked, "--with", "inpaint:mask=mask.png", says=["given twice"])
    refused("edit", *masked, "--with", "inpaint:feather=3", says=["parameter of inpaint 'feather'"])
    refused("edit", *masked, "--seed", -1, says=["seed", "greater than or equal to 0"])
    refused(
        "edit", photo[0], PROMPT, "--model", tiny_sd, "--with", "inpaint", "--mask", "mask.png", says=["sees a mask"]
    )
    refused(
        "edit",
        photo[0],
        PROMPT,
        "--from",
        "a cube",
        "--model",
        tiny_sd,
        "--seed",
        1,
        says=["seed cannot be given to prompt_to_prompt"],
    )
    Image.new("L", (16, 32), 255).save("small.png")
    refused("edit", *given, "--mask", "small.png", says=["16x32", "32x32"])


# segment --------------------------------------------------------------------------------------------------------------


def test_a_name_and_pictures_become_masks_and_a_segmenter(sfumato, tiny_sd, tiny_inpaint, refused):
    Path("toys").mkdir()
    rng = np.random.default_rng(2)
    for name, size in (("one.png", (32, 32)), ("two.jpg", (32, 48)), ("three.png", (40, 32))):
        Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).save(Path("toys") / name)
    given = ("--model", tiny_sd, "--remover", tiny_inpaint, "--steps", 2, "--iterations", 2, "-o", "cubes")
    done = sfumato("segment", "cube", "toys", *given)
    assert done.code == 0, done.err
    assert done.lines == [f"cubes/masks/{name}.png" for name in ("one", "three", "two")] + [
        "cubes/segmenter.safetensors"
    ]
    rows = [json.loads(line) for line in Path("cubes/metadata.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == ["cube", ""] * 3
    again = sfumato("segment", "cubes/segmenter.safetensors", "toys/two.jpg", "-o", "more")
    assert again.code == 0 and Image.open(again.lines[0]).size == (48, 32), again.err
    refused("segment", "cube", "toys", *given, says=["cubes", "not empty"])
    refused("segment", "cubes/segmenter.safetensors", "-o", "x", says=["name the pictures"])
    refused("segment", "cubes/segmenter.safetensors", "toys", "-o", "x", "--steps", 2, says=["trained already"])
    refused("segment", "toys/one.safetensors", "toys", "-o", "x", says=["one.safetensors"])
    refused("segment", "cube", "toys", "-n", 3, "-o", "x", says=["-n"])
    Path("empty").mkdir()
    refused("segment", "cube", "empty", "-o", "x", says=["no picture"])
    refused("segment", "cube", "toys", "--prompt", "a photo", "-o", "x", says=["must hold {}"])


def test_pictures_are_made_where_none_are_given(sfumato, tiny_sd):
    done = sfumato("segment", "cube", "-n", 2, "--model", tiny_sd, "--steps", 2, "--iterations", 1, "-o", "made")
    assert done.code == 0, done.err
    assert sorted(path.name for path in Path("made/foreground").iterdir()) == ["00000.png", "00001.png"]
    found = package.segment("cube", n=2, model=load(tiny_sd), steps=2, iterations=1, width=4)
    first = np.asarray(found.pictures[0].permute(1, 2, 0).add(1).mul(127.5).round().to(torch.uint8))
    assert np.abs(first.astype(int) - pixels("made/foreground/00000.png")).max() <= 1


def test_a_built_in_remover_draws_at_the_size_of_the_pictures_or_the_model_is_its_own():
    """toy-sd-inpaint drew blotches into pictures of another size than it was trained on."""
    inpainting = load("toy-sd-inpaint")
    for name in ("toy-sd", "toy-sd3"):
        model = load(name)
        remover = segmenting._default_remover(model)
        fits = inpainting.default_size == model.default_size
        assert remover.default_size == model.default_size and (remover is model) is not fits
        assert remover.card["background"], "what the model knows no words for is drawn as a toy"
