"""What users of steering and editing systems get wrong, on the command line: words, phrases, masks, pictures, pairs,
families, numbers that run away. One line each, that names the remedy, and nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfumato.models.quiet import quiet
from tests.tiny import tiny_pipeline

PROMPT = "a red cube and a blue ball"
SOURCE = "prompt_to_prompt:source=a red cube and a blue cone"
HALF = np.zeros((32, 32), np.uint8)
HALF[:, :16] = 255


@pytest.fixture(scope="module")
def tiny_sd3(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-sd3"
    with quiet():
        tiny_pipeline("sd3").save_pretrained(folder)
    return folder


@pytest.fixture
def pictures(sfumato, monkeypatch, tmp_path):
    """Pictures and masks of every kind in the working folder; no experts."""
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))
    y, x = np.mgrid[0:32, 0:48]
    colors = np.stack([5 * x, 7 * y, 250 - 5 * x], -1).astype(np.uint8)
    photo = Image.fromarray(colors)
    photo.save("photo.png")
    photo.save("photo.jpg", quality=95)
    photo.convert("CMYK").save("cmyk.jpg", quality=95)
    turned = Image.Exif()
    turned[0x112] = 6
    photo.transpose(Image.Transpose.ROTATE_90).save("turned.jpg", quality=95, exif=turned)
    photo.crop((0, 0, 41, 29)).save("odd.png")
    photo.crop((0, 0, 1, 1)).save("one.png")
    photo.convert("P").save("palette.png")
    whole = Path("photo.jpg").read_bytes()
    Path("cut.jpg").write_bytes(whole[: len(whole) * 3 // 4])
    Path("text.png").write_text("no picture")
    Image.fromarray(HALF).save("half.png")
    Image.fromarray(np.kron(HALF, np.ones((3, 2), np.uint8))).save("large.png")
    Image.fromarray(HALF.astype(np.uint16) * 257).save("deep.png")
    Image.fromarray(np.dstack([np.full((32, 32, 3), 7, np.uint8), HALF])).save("alpha.png")
    Image.fromarray(HALF // 255).save("zero-one.png")
    Image.fromarray(np.where(HALF, 180, 60).astype(np.uint8)).save("grey.png")
    Image.fromarray(np.dstack([colors[:, :32], HALF])).save("both.png")
    Image.new("L", (32, 32), 0).save("empty.png")
    Image.new("L", (32, 32), 255).save("full.png")


@pytest.fixture
def make(tiny_sd, pictures):
    """The arguments of a short run with systems."""

    def arguments(*systems: str, model=tiny_sd) -> tuple:
        return ("make", PROMPT, "--model", model, "--steps", 2, *(x for one in systems for x in ("--with", one)))

    return arguments


BOX = "box=[0|0|0.5|1]"


@pytest.mark.parametrize(
    "system",
    [
        "attend_excite:words=[frog]",
        "structured_guidance:phrases=[green frog]",
        f"shape_guided:words=[frog],{BOX}",
        f"paint_with_words:phrases=[frog],{BOX}",
        f"{SOURCE},reweight=[frog=2]",
        f"{SOURCE},blend=[frog]",
        f"{SOURCE},windows=[frog=0-1]",
    ],
)
def test_words_that_are_not_in_the_prompt(refused, make, system):
    refused(*make(system), says=["frog' is not in the prompt", "Its words: a, red, cube, and, blue, ball"])


@pytest.mark.parametrize(
    ("system", "says"),
    [
        (f"{SOURCE},reweight=[red cube=2|cube=3]", ["'red cube' and 'cube' overlap", "reweight"]),
        (f"{SOURCE},windows=[red cube=0-0.5|cube=0.5-1]", ["'red cube' and 'cube' overlap", "windows"]),
        (
            "shape_guided:words=[red cube|cube],box=[[0|0|0.4|1]|[0.6|0|1|1]]",
            ["'red cube' and 'cube' both stand in 'a red cube'", "words of its own"],
        ),
        ("attend_excite:words=[<start>]", ["special tokens"]),
        (f"shape_guided:words=[<start>],{BOX}", ["special tokens"]),
        ('structured_guidance:phrases=[" "]', ["a word or phrase of the prompt is expected"]),
        ("attend_excite:words=[cube#2]", ["occurrence=2 of 'cube'", "the prompt has it once"]),
    ],
)
def test_phrases_that_overlap_or_are_none(refused, make, system, says):
    refused(*make(system), says=says)


def test_phrases_that_overlap_and_agree_are_fine(sfumato, make):
    for system in (
        "attend_excite:words=[red cube|cube]",
        "structured_guidance:phrases=[red cube|cube and a]",
        f"{SOURCE},reweight=[red cube=2|cube=2]",
    ):
        assert sfumato(*make(system)).code == 0


MASKED = [
    "shape_guided:words=[cube],mask={}",
    "paint_with_words:phrases=[cube],mask={}",
    "blend:source=a green ball,mask={}",
]


@pytest.mark.parametrize("system", MASKED)
def test_masks_in_every_form_are_one_mask(sfumato, make, system):
    """Another size, 16 bits, transparency, 0 and 1, and greys where only yes or no counts: the same picture."""
    seen = set()
    forms = ["half", "large", "deep", "alpha", "zero-one", *([] if system.startswith("paint") else ["grey"])]
    for form in forms:
        done = sfumato(*make(system.format(f"{form}.png")), "-o", form)
        assert done.code == 0 and done.err == "", done.err
        seen.add(np.asarray(Image.open(done.lines[0])).tobytes())
    assert len(seen) == 1


@pytest.mark.parametrize("system", MASKED)
@pytest.mark.parametrize(
    ("mask", "says"),
    [
        ("both.png", ["both.png", "colours and transparency", "save it in black and white"]),
        ("text.png", ["text.png cannot be read as a picture"]),
        ("cut.jpg", ["cut.jpg cannot be read as a picture", "truncated"]),
        ("missing.png", ["missing.png", "no file"]),
    ],
)
def test_masks_that_are_none(refused, make, system, mask, says):
    refused(*make(system.format(mask)), says=says)


def test_masks_that_hold_nothing_or_everything(sfumato, refused, make):
    refused(*make(MASKED[0].format("empty.png")), says=["region 1 of shape_guided is empty"])
    refused(*make(MASKED[0].format("full.png")), says=["cover the whole picture", "an outside"])
    refused(*make(MASKED[1].format("empty.png")), says=["nothing is painted for 'cube'"])
    assert sfumato(*make(MASKED[1].format("full.png"))).err == ""
    for mask, told in (("empty.png", "nothing is drawn anew"), ("full.png", "nothing of the picture is kept")):
        done = sfumato(*make(MASKED[2].format(mask)))
        assert done.code == 0 and done.err.startswith("warning: ") and told in done.err and done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("picture", "says"),
    [
        ("cut.jpg", ["cut.jpg cannot be read as a picture", "truncated"]),
        ("text.png", ["text.png cannot be read as a picture"]),
        ("missing.png", ["missing.png", "No such file"]),
    ],
)
def test_pictures_to_begin_from_that_do_not_fit(refused, make, picture, says):
    refused(*make("blend:mask=half.png"), "--image", picture, "--strength", 1, says=says)


def test_pictures_to_begin_from_in_every_form(sfumato, make):
    """CMYK, turned by EXIF, indexed colours: nearly the picture itself, in the size that is said; odd sizes fitted."""
    keep = "blend:box=[0|0|0.25|0.25],paste=0"
    plain = np.asarray(Image.open("photo.png")).astype(int)
    for name in ("photo.png", "photo.jpg", "cmyk.jpg", "turned.jpg", "palette.png"):
        done = sfumato(*make(keep), "--image", name, "--strength", 1, "--size", "48x32", "-o", "drawn")
        assert done.code == 0, done.err
        made = np.asarray(Image.open(done.lines[0])).astype(int)
        assert made.shape == plain.shape and np.abs(made[8:, 12:] - plain[8:, 12:]).mean() < 25, name
    for name, size, said in (
        ("odd.png", (40, 24), ["--size", "40x24"]),
        ("odd.png", (40, 24), []),
        ("one.png", (32, 32), []),
    ):
        done = sfumato(*make(keep), "--image", name, "--strength", 1, *said)
        assert done.code == 0 and Image.open(done.lines[0]).size == size, done.err


@pytest.mark.parametrize(
    ("systems", "says"),
    [
        (["blend:source=a dog,mask=half.png", "blend:source=a cat,mask=half.png"], ["each replace the trajectory"]),
        (["shape_guided:words=[cube],mask=half.png"] * 2, ["shape_guided is given twice", "all regions"]),
        (["structured_guidance"] * 2, ["structured_guidance is given twice"]),
        ([SOURCE, "prompt_to_prompt:source=a dog"], ["prompt_to_prompt is given twice"]),
        (["attend_excite", SOURCE], ["prompt_to_prompt replaces that attention", "leave one of them out"]),
        ([SOURCE, "shape_guided:words=[cube],mask=half.png"], ["laid the text out anew", "cross_replace=0"]),
        (["structured_guidance", "shape_guided:words=[cube],mask=half.png"], ["laid the text out anew"]),
        (["shape_guided:words=[cube],mask=half.png", "structured_guidance"], ["laid the text out anew"]),
        (["blend:mask=half.png"], ["give the run an image to begin from, or source"]),
        (["shape_guided:words=[cube],source=[a dog],mask=half.png"], ["no image is given"]),
        (["attend_excite:layers=[nothing]"], ["match none", "down.0, mid, up.1"]),
        (["attend_excite:resolution=5"], ["attends to text at 16, 8"]),
        ([f"{SOURCE},layers=[nothing]"], ["match none", "down.0"]),
        (["experts"], ["no expert was trained from", "init_from and loss.interval"]),
        (["experts:models=[nobody]"], ["unknown expert 'nobody'"]),
        (["paint_with_words:phrases=[cube],map=half.png,colors=[green]"], ["nowhere in the map", "#ffffff"]),
        (["paint_with_words:phrases=[cube|ball],mask=half.png"], ["2 phrases for 1 regions"]),
        (["shape_guided:words=[cube],box=[0.5|0|0.2|1]"], ["box is 0.5|0|0.2|1", "x0 < x1"]),
    ],
)
def test_systems_that_cannot_run_so(refused, make, systems, says):
    refused(*make(*systems), says=says)


def test_two_trajectories_on_a_picture(refused, make):
    follow = "shape_guided:words=[cube],source=[a dog],mask=half.png"
    given = ("--image", "photo.png", "--strength", 1, "--scheduler", "ddim")
    refused(*make("blend:mask=half.png", follow), *given, says=["blend and shape_guided each replace the trajectory"])


def test_a_family_without_the_sites_that_are_needed(refused, make, tiny_sd3):
    refused(*make("structured_guidance", model=tiny_sd3), says=["linear function of the text", "has none"])


@pytest.mark.parametrize(
    ("system", "says"),
    [
        (
            "attend_excite:words=[cube],strength=1e38",
            ["stopped being finite at step 1 of 2", "lower the strength of attend_excite"],
        ),
        (f"shape_guided:words=[cube],{BOX},boost=1e38", ["stopped being finite at step 1 of 2"]),
        (f"{SOURCE},reweight=[ball=nan]", ["'ball=nan' is not word=factor"]),
        (f"{SOURCE},reweight=[ball=1e30]", ["'ball=1e30' is not word=factor"]),
        ("attend_excite:strength=nan", ["strength", "finite"]),
    ],
)
def test_numbers_that_run_away_stop_the_run_and_say_where(refused, make, system, says):
    refused(*make(system), says=says)


def test_what_was_made_before_is_kept(sfumato, tiny_sd, pictures):
    Path("p.jsonl").write_text('{"prompt": "a cube"}\n{"prompt": "a ball", "guidance": 1e30}\n{"prompt": "a cone"}\n')
    done = sfumato("make", "--prompts", "p.jsonl", "--model", tiny_sd, "--steps", 2, "--with", "daam")
    assert done.code == 2 and "line 2: latents stopped being finite at step" in done.err
    assert {"out/a-cube-0.png", "out/a-cone-0.png"} <= set(done.lines)


# --- edit -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["photo.png", "photo.jpg", "cmyk.jpg", "turned.jpg", "odd.png", "one.png", "palette.png"]
)
def test_any_picture_can_be_edited(sfumato, tiny_sd, pictures, name):
    call = ("--from", "a red cube", "--model", tiny_sd, "--steps", 2, "--inner", 0)
    done = sfumato("edit", name, "a blue cube", *call)
    assert done.code == 0 and len(done.lines) == 1, done.err
    width, height = Image.open(done.lines[0]).size
    assert (width > height) == (name not in ("one.png",)) and width % 8 == height % 8 == 0


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        ("empty.png", ["the mask is dark everywhere"]),
        ("large.png", ["the mask is 64x96, but the picture is 32x32", "must agree"]),
        ("both.png", ["colours and transparency"]),
        ("text.png", ["text.png cannot be read as a picture"]),
        ("missing.png", ["missing.png"]),
    ],
)
def test_masks_of_an_edit(refused, tiny_sd, pictures, mask, says):
    call = ("half.png", "a blue cube", "--from", "a red cube", "--model", tiny_sd, "--steps", 1, "--inner", 0)
    refused("edit", *call, "--mask", mask, says=says)


def test_an_edit_that_runs_away_says_where(refused, tiny_sd, pictures):
    call = ("half.png", "a blue cube", "--from", "a red cube", "--model", tiny_sd, "--steps", 2, "--guidance", 1e30)
    refused("edit", *call, says=["stopped being finite at step"])
