"""Files whole or absent; recipes in pictures, read back without trust."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sfumato import files
from sfumato.errors import BadInput
from sfumato.files import read_picture, read_recipe, save_png
from sfumato.writing import atomic_write, free_name, output_folder, slug

RECIPE = {
    "sfumato": "0.1.0",
    "prompt": "ein roter Würfel, 红 🧊\nzweite Zeile",
    "negative": "blurry, dark",
    "seed": 2**40 + 1,
    "steps": 20,
    "guidance": 4.5,
    "size": [64, 48],
    "scheduler": "dpm++",
    "model": "toy, sd: small",
    "hash": "ab" * 32,
    "with": [{"method": "daam", "params": {"words": ["ball"]}}],
}


def noise(size=(32, 24), seed=0):
    return Image.frombytes("RGB", size, random.Random(seed).randbytes(size[0] * size[1] * 3))


def test_recipe_and_pixels_round_trip(tmp_path):
    image = noise()
    path = save_png(tmp_path / "a.png", image, RECIPE)
    assert read_recipe(path) == (RECIPE, True)
    assert Image.open(path).tobytes() == image.tobytes()
    assert os.listdir(tmp_path) == ["a.png"]


def test_other_tools_find_their_own_text(tmp_path):
    text = Image.open(save_png(tmp_path / "a.png", noise(), RECIPE)).text["parameters"]
    assert text.startswith(
        RECIPE["prompt"] + "\nNegative prompt: blurry, dark\nSteps: 20, Sampler: DPM++ 2M, CFG scale: 4.5"
    )
    assert 'Model: "toy, sd: small"' in text and f"Seed: {2**40 + 1}" in text and "Size: 64x48" in text


def test_a_picture_of_another_tool(tmp_path):
    chunks = PngInfo()
    chunks.add_text(
        "parameters",
        "a red cube, (best:1.2)\nNegative prompt: ugly\nmore ugly\n"
        'Steps: 25, Sampler: Euler a, CFG scale: 7, Seed: 3, Size: 512x768, Model hash: abc, Lora hashes: "x: 1, y: 2"',
    )
    noise().save(tmp_path / "a.png", pnginfo=chunks)
    assert read_recipe(tmp_path / "a.png") == (
        {
            "prompt": "a red cube, (best:1.2)",
            "negative": "ugly\nmore ugly",
            "steps": 25,
            "guidance": 7.0,
            "seed": 3,
            "size": [512, 768],
            "scheduler": "euler_a",
        },
        False,
    )


def _png_with(chunk, text, path):
    chunks = PngInfo()
    chunks.add_itxt(chunk, text)
    noise().save(path, pnginfo=chunks)
    return path


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: p.write_bytes(b""), "cannot be read as a picture"),
        (lambda p: p.write_bytes(b"\x80\x04picklish" * 9), "cannot be read as a picture"),
        (lambda p: noise().save(p), "carries no recipe"),
        (lambda p: _png_with("sfumato", "{nonsense", p), "damaged recipe"),
        (lambda p: _png_with("sfumato", "[1, 2]", p), "damaged recipe"),
        (lambda p: _png_with("sfumato", '{"guidance": NaN}', p), "damaged recipe"),
        (lambda p: _png_with("sfumato", "[" * 200_000, p), "damaged recipe"),
        (lambda p: _png_with("sfumato", '{"seed": ' + "9" * 10_000 + "}", p), "damaged recipe"),
        (lambda p: _png_with("sfumato", json.dumps({"prompt": "x" * 1_000_001}), p), "more than 1000000 characters"),
        (lambda p: _bomb(p), "cannot be read as a picture"),
    ],
)
def test_strange_pictures_are_refused_in_one_line(tmp_path, make, says):
    path = tmp_path / "strange.png"
    make(path)
    with pytest.raises(BadInput) as caught:
        read_recipe(path)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def _bomb(path):
    """A small file whose compressed text would unfold to 200 MB."""
    noise().save(path)
    data = path.read_bytes()
    body = b"zTXt" + b"sfumato\0\0" + zlib.compress(b"a" * 200_000_000, 9)
    chunk = (len(body) - 4).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
    path.write_bytes(data[:33] + chunk + data[33:])


def test_every_truncation_is_read_or_refused(tmp_path):
    whole = save_png(tmp_path / "a.png", noise((8, 8)), RECIPE).read_bytes()
    path = tmp_path / "cut.png"
    for end in range(0, len(whole), 7):
        path.write_bytes(whole[:end])
        try:
            recipe, _ = read_recipe(path)
        except BadInput:
            continue
        assert recipe["prompt"] == RECIPE["prompt"]


def test_a_missing_picture_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_recipe(tmp_path / "none.png")


@pytest.mark.parametrize(
    "error", [RuntimeError("x"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")]
)
def test_a_failure_in_the_middle_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(type(error)):
        with atomic_write(path) as file:
            file.write(b"half")
            raise error
    assert os.listdir(tmp_path) == ["a.bin"] and path.read_bytes() == b"old"


def test_a_full_disk_leaves_nothing(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))  # in the test alone: what pytest writes is a file too
    try:
        with pytest.raises(OSError) as caught:
            save_png(tmp_path / "a.png", noise((64, 64)), RECIPE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.filename == str(tmp_path / "a.png") and caught.value.errno == errno.EFBIG
    assert os.listdir(tmp_path) == []


def test_new_files_obey_the_umask(tmp_path):
    mask = os.umask(0o027)
    try:
        save_png(tmp_path / "a.png", noise(), RECIPE)
    finally:
        os.umask(mask)
    assert (tmp_path / "a.png").stat().st_mode & 0o777 == 0o640


def test_output_folder(tmp_path):
    with output_folder(tmp_path / "x" / "y") as folder:
        (folder / "file").write_text("kept")
    assert (tmp_path / "x" / "y" / "file").is_file()
    with pytest.raises(BadInput, match="is a file"), output_folder(tmp_path / "x" / "y" / "file"):
        pass
    with pytest.raises(OSError), output_folder(tmp_path / "x" / "y" / "file" / "below"):
        pass


def test_an_output_folder_that_got_nothing_is_taken_away(tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "a" / "b", tmp_path / "empty"):
        with pytest.raises(RuntimeError), output_folder(folder):
            raise RuntimeError
    assert os.listdir(tmp_path) == ["empty"]


def test_pictures_come_upright_and_in_rgb(tmp_path):
    image = noise((20, 10)).convert("CMYK")
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter
    image.save(tmp_path / "a.jpg", exif=exif)
    assert (read_picture(tmp_path / "a.jpg").mode, read_picture(tmp_path / "a.jpg").size) == ("RGB", (10, 20))
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:300])
    with pytest.raises(BadInput, match="cannot be read as a picture"):
        read_picture(tmp_path / "cut.jpg")


def test_a_picture_with_too_many_pixels_is_not_unpacked(tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "a.png")
    with pytest.raises(BadInput, match="20000x20000|cannot be read"):
        read_picture(tmp_path / "a.png")


def test_names(tmp_path):
    assert slug("A red cube, and a BLUE ball!") == "a-red-cube-and-a-blue-ball"
    assert slug("🧊🧊") == "picture" and slug("红色 方块") == "红色-方块"
    assert slug("x" * 500) == "x" * 60 and len(slug("word " * 10_000)) <= 60
    assert len(slug("𝒳" * 60).encode()) <= 180
    assert slug("../../etc/passwd") == "etc-passwd"
    (tmp_path / "a.png").touch()
    (tmp_path / "a-2.png").touch()
    assert free_name(tmp_path, "a").name == "a-3.png"


# -- strangers' pictures -----------------------------------------------------------------------------------------------


def test_pictures_of_every_kind_become_upright_rgb(tmp_path):
    def read(image, name="x.png", **options):
        image.save(tmp_path / name, **options)
        return np.asarray(files.read_picture(tmp_path / name)).astype(int)

    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    deep = read(Image.fromarray(ramp))
    assert deep.shape == (8, 8, 3) and np.abs(deep[..., 0] - ramp / 257).max() <= 0.5 + 1e-6  # not cut off at 255
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    clear.putpixel((0, 0), (255, 0, 0, 255))
    clear.putpixel((1, 0), (0, 0, 0, 128))
    seen = read(clear)
    assert tuple(seen[0, 0]) == (255, 0, 0) and tuple(seen[3, 3]) == (255, 255, 255) and abs(seen[0, 1, 0] - 127) <= 1
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 99, 199])
    assert tuple(read(palette, transparency=0)[0, 0]) == (9, 99, 199)
    cyan = read(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "x.jpg", quality=100)
    assert cyan[0, 0, 0] < 60 and cyan[0, 0, 1] > 150
    turned = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right by 90 degrees
    assert read(turned, exif=exif).shape == (6, 4, 3)
    half = read(Image.fromarray(np.full((4, 4), 0.5, np.float32)), "x.tiff")
    assert set(half.flatten()) == {128}


def test_pictures_are_cut_at_equal_parts_and_never_distorted():
    columns = np.repeat(np.arange(90, dtype=np.uint8)[None], 30, 0)
    cut = np.asarray(files.fitted(Image.fromarray(columns), (30, 30)))
    assert cut.shape == (30, 30) and abs(int(cut[0, 0]) - 30) <= 1 and abs(int(cut[0, -1]) - 59) <= 1
    same = Image.fromarray(columns)
    assert files.fitted(same, (90, 30)) is same
    mask = Image.fromarray(((columns > 44) * 255).astype(np.uint8))
    assert set(np.asarray(files.fitted(mask, (40, 24), smooth=False)).flatten()) == {0, 255}


# --- tensors --------------------------------------------------------------------------------------------------------


def test_tensors_come_back_and_anything_else_is_refused_in_one_line(tmp_path):
    path = files.save_tensors(tmp_path / "kept", {"a": torch.arange(3.0)}, {"format": "things-1", "more": "told"})
    with files.reading_tensors(path, "things-1", "things") as (file, metadata):
        assert torch.equal(file.get_tensor("a"), torch.arange(3.0)) and metadata["more"] == "told"
    damaged, text = tmp_path / "damaged", tmp_path / "text"
    damaged.write_bytes(path.read_bytes()[:-2])
    text.write_text("no tensors")
    for wrong, form, says in (
        (path, "things-2", r"holds no things of this version \(things-2\)"),
        (damaged, "things-1", "holds no things, or it is damaged"),
        (text, "things-1", "holds no things, or it is damaged"),
    ):
        with pytest.raises(BadInput, match=says), files.reading_tensors(wrong, form, "things"):
            pass
    with (
        pytest.raises(BadInput, match="damaged"),
        files.reading_tensors(path, "things-1", "things") as (file, metadata),
    ):
        metadata["missing"]
    with pytest.raises(OSError), files.reading_tensors(tmp_path / "nowhere", "things-1", "things"):
        pass
    with pytest.raises(KeyboardInterrupt), files.reading_tensors(path, "things-1", "things"):
        raise KeyboardInterrupt
