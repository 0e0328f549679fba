"""`sfumato edit`: pictures that sfumato made, pictures that exist, masks, repetition, and whatever may be wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sfumato as package
from sfumato import files
from sfumato.errors import BadInput, NoMatch
from sfumato.models import load
from sfumato.sampling import generate

SOURCE, TARGET = "a red cube on a dog", "a blue ball on a dog"
FAST = ("--steps", 2)


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


@pytest.fixture
def made(sfumato, tiny_sd):
    done = sfumato("make", SOURCE, "--model", tiny_sd, *FAST, "--seed", 7)
    assert done.code == 0, done.err
    return done.lines[0]


@pytest.fixture
def photo():
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (60, 90, 3), np.uint8)).save("photo.jpg", quality=95)
    return "photo.jpg"


def edited(sfumato, *args):
    done = sfumato("edit", *args)
    assert done.code == 0, done.err
    return done


def test_a_picture_of_ours_is_drawn_again_and_edited(sfumato, tiny_sd, made):
    done = edited(sfumato, made, TARGET, SOURCE, "--model", tiny_sd)
    assert done.err == "" and [Path(line).parent.name for line in done.lines] == ["out", "out"]
    ours, same = done.lines
    assert (pixels(same) == pixels(made)).all()  # the same prompt: the same picture, bit for bit
    system = package.build(f"prompt_to_prompt:source={SOURCE}")
    expected = generate(load(tiny_sd), TARGET, steps=2, seed=7, interventions=system)
    assert (pixels(ours) == np.asarray(expected.images[0])).all()
    recipe, exact = files.read_recipe(ours)
    assert exact and recipe["prompt"] == TARGET and recipe["edit"]["picture"] == Path(made).name
    again = edited(sfumato, made, "--like", ours, "--model", tiny_sd, "-o", "again").lines
    assert Path(again[0]).read_bytes() == Path(ours).read_bytes()


def test_words_and_parameters_reach_the_edit(sfumato, tiny_sd, made):
    first = edited(
        sfumato, made, "a small red cube on a dog", "--reweight", "small=2", "--mode", "refine", "--model", tiny_sd,
        "--with", "prompt-to-prompt:cross_replace=0.5,self_replace=0.2",
    ).lines[0]  # fmt: skip
    described = files.read_recipe(first)[0]["edit"]["with"][0]
    assert described["method"] == "prompt_to_prompt"
    told = {name: described["params"][name] for name in ("mode", "reweight", "cross_replace", "self_replace", "source")}
    assert told == {
        "mode": "refine", "reweight": ["small=2"], "cross_replace": [0.5], "self_replace": [0.2], "source": SOURCE,
    }  # fmt: skip


def test_the_pictures_of_a_trace_are_written_beside_the_edit(sfumato, tiny_sd, made):
    plain = edited(sfumato, made, TARGET, "--model", tiny_sd, "-o", "plain").lines
    traced = edited(sfumato, made, TARGET, "--with", "daam:words=[ball]", "--model", tiny_sd, "-o", "traced").lines
    picture, heat = map(Path, traced)
    assert heat.name == f"{picture.stem}.heat.png" and (pixels(picture) == pixels(plain[0])).all()
    assert files.read_recipe(heat)[0]["edit"]["with"][1]["method"] == "daam"
    again = edited(sfumato, made, "--like", picture, "--model", tiny_sd, "-o", "again").lines
    assert [Path(line).read_bytes() for line in again] == [picture.read_bytes(), heat.read_bytes()]


def test_a_mask_keeps_what_lies_outside(sfumato, tiny_sd, made):
    mask = np.zeros((32, 32), np.uint8)
    mask[5:19, 8:30] = 255
    Image.fromarray(mask).save("mask.png")
    free = edited(sfumato, made, TARGET, "--model", tiny_sd).lines[0]
    kept = edited(sfumato, made, TARGET, "--mask", "mask.png", "--model", tiny_sd).lines[0]
    outside = mask == 0
    assert (pixels(kept)[outside] == pixels(made)[outside]).all()
    assert (pixels(kept)[~outside] != pixels(made)[~outside]).any()
    assert (pixels(free)[outside] != pixels(made)[outside]).any()
    again = edited(sfumato, made, "--like", kept, "--mask", "mask.png", "--model", tiny_sd, "-o", "again").lines[0]
    assert Path(again).read_bytes() == Path(kept).read_bytes()


def test_a_mask_may_lie_in_the_transparency(sfumato, tiny_sd, made):
    level = np.zeros((32, 32), np.uint8)
    level[5:19, 8:30] = 255
    Image.fromarray(level).save("grey.png")
    clear = Image.new("RGBA", (32, 32), (10, 20, 30, 0))
    clear.putalpha(Image.fromarray(level))
    clear.save("clear.png")
    one, two = (
        edited(sfumato, made, TARGET, "--mask", name, "--model", tiny_sd, "-o", name[:-4]).lines[0]
        for name in ("grey.png", "clear.png")
    )
    assert np.array_equal(np.asarray(Image.open(one)), np.asarray(Image.open(two)))


def test_a_mask_that_is_all_white_changes_nothing(sfumato, tiny_sd, made):
    Image.new("L", (32, 32), 255).save("mask.png")
    free = edited(sfumato, made, TARGET, "--model", tiny_sd).lines[0]
    kept = edited(sfumato, made, TARGET, "--mask", "mask.png", "--model", tiny_sd).lines[0]
    assert (pixels(free) == pixels(kept)).all()


def test_a_picture_that_exists_is_inverted(sfumato, tiny_sd, photo):
    call = ("--from", SOURCE, "--model", tiny_sd, "--steps", 2, "--inner", 1, "--guidance", 3)
    done = edited(sfumato, photo, TARGET, *call)
    ours = done.lines[0]
    width, height = Image.open(ours).size
    assert (width, height) == (40, 24)  # about the model's own area in the picture's shape
    recipe, _ = files.read_recipe(ours)
    assert recipe["edit"]["from"] == SOURCE and recipe["latents"] and recipe["edit"]["options"]["inner"] == 1
    again = edited(sfumato, photo, "--like", ours, "--model", tiny_sd, "-o", "again").lines[0]
    assert Path(again).read_bytes() == Path(ours).read_bytes()
    mask = np.zeros((60, 90), np.uint8)
    mask[:, 45:] = 255
    Image.fromarray(mask).save("mask.png")
    kept = edited(sfumato, photo, TARGET, *call, "--mask", "mask.png", "-o", "masked").lines[0]
    original = np.asarray(files.fitted(files.read_picture(photo), (40, 24))).astype(int)
    assert (pixels(kept)[:, :20] == original[:, :20]).all() and (pixels(kept)[:, 20:] != original[:, 20:]).any()


def test_python_gives_further_edits_at_their_own_cost(tiny_sd, made):
    model = load(tiny_sd)
    first = package.edit(made, TARGET, model=model, reweight={"ball": 1.5})
    more = package.edit(first.original, [TARGET, "a red cone on a dog"])
    assert more.results[0].cost == 4.0 and len(more.images) == 2  # two steps of two branches
    single = package.edit(Image.open(made).convert("RGB"), TARGET, from_=SOURCE, model=model, steps=2, inner=1)
    assert single.original.facts["inverted"] and single.original.fidelity > 0
    with pytest.raises(BadInput, match="as it was opened"):
        package.edit(first.original, TARGET, steps=3)
    with pytest.raises(NoMatch, match="Did you mean 'ball'"):
        package.edit(first.original, TARGET, reweight={"balls": 2.0})


def test_a_changed_picture_of_ours_is_told(sfumato, tiny_sd, made):
    recipe, _ = files.read_recipe(made)
    image = Image.open(made).convert("RGB")
    image.paste((255, 0, 0), (0, 0, 16, 16))
    files.save_png("changed.png", image, recipe)
    done = edited(sfumato, "changed.png", TARGET, "--model", tiny_sd)
    assert "its recipe makes another picture here" in done.err and "--invert" in done.err
    done = edited(sfumato, "changed.png", TARGET, "--invert", "--model", tiny_sd, *FAST, "--inner", 0)
    assert done.err == "" and files.read_recipe(done.lines[0])[0]["edit"]["invert"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("photo.jpg", TARGET), ["photo.jpg carries no recipe", "--from"]),
        (("photo.jpg",), ["nothing to do"]),
        (("missing.png", TARGET), ["missing.png"]),
        (("photo.jpg", TARGET, "--from", SOURCE, "--reweight", "ball"), ["word=factor"]),
        (("photo.jpg", TARGET, "--from", SOURCE, "--mode", "swap"), ["mode", "replace"]),
        (("photo.jpg", TARGET, "--from", SOURCE, "--with", "promt"), ["unknown method"]),
        (("photo.jpg", TARGET, "--from", SOURCE, "--size", "33x32", "--steps", 2), ["multiples of 8"]),
        (("photo.jpg", TARGET, "--from", SOURCE, "--mask", "small.png", "--steps", 1, "--inner", 0), ["must agree"]),
        (
            ("photo.jpg", TARGET, "--from", SOURCE, "--mask", "dark.png", "--steps", 1, "--inner", 0),
            ["dark everywhere"],
        ),
        (("photo.jpg", TARGET, "--from", SOURCE, "--inner", 200), ["inner"]),
        (("photo.jpg", " ", "--from", SOURCE), ["must say something"]),
        (("photo.jpg", TARGET, "--from", ""), ["from_ of edit is '': a prompt must say something"]),
        (("photo.jpg", TARGET, "--from", SOURCE, "--with", "blend:mask=dark.png"), ["from cannot be given to blend"]),
        (("photo.jpg", "--like", "photo.jpg"), ["carries no recipe"]),
        (("cut.jpg", TARGET, "--from", SOURCE), ["cut.jpg cannot be read as a picture", "truncated"]),
        (("text.png", TARGET, "--from", SOURCE), ["text.png cannot be read as a picture"]),
    ],
)
def test_bad_input(refused, tiny_sd, photo, args, says):
    Image.new("L", (9, 9), 255).save("small.png")
    Image.new("L", (90, 60), 100).save("dark.png")
    Path("cut.jpg").write_bytes(Path(photo).read_bytes()[:3000])
    Path("text.png").write_text("no picture")
    refused("edit", *args, "--model", tiny_sd, says=says)


def test_recipes_that_do_not_fit(sfumato, refused, tiny_sd, made, photo):
    ours = edited(sfumato, made, TARGET, "--model", tiny_sd).lines[0]
    refused("edit", photo, "--like", ours, "--model", tiny_sd, says=["photo.jpg is not the picture"])
    refused("edit", made, "--like", ours, "--mask", photo, "--model", tiny_sd, says=["photo.jpg is not the mask"])
    refused("edit", made, "--like", made, says=["is no edit", "sfumato make --like"])
    again = sfumato("edit", made, "--like", ours, "-o", "again.png")  # the folder in the recipe is found again
    assert again.lines[0] == "again.png" and (pixels("again.png") == pixels(ours)).all()
    refused("edit", made, "--like", ours, "--steps", 4, "--model", tiny_sd, says=["as it was"])
    refused("make", "--like", ours, "--model", tiny_sd, says=["is an edit", "sfumato edit ORIGINAL --like"])
    refused("edit", made, TARGET, "--steps", 4, "--model", tiny_sd, says=["steps cannot be given", "recipe"])
    refused("edit", made, TARGET, "--from", "a cat", "--model", tiny_sd, says=["from is 'a cat'", SOURCE])
