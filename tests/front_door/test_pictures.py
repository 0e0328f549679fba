"""Pictures and masks are read alike however they are given: file, PIL picture, array, tensor, of any depth and mode."""

from __future__ import annotations

import base64
import contextlib
import io
import random

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato import files, masks
from sfumato.app.pictures import size_of
from sfumato.edit.blend import Blend
from sfumato.edit.inpaint import Inpaint
from sfumato.errors import BadInput
from sfumato.files import read_picture
from sfumato.sampling import generate
from sfumato.sampling.pixels import as_pixels
from tests.tiny import tiny_model

GREY = np.linspace(0, 255, 48).round().astype(np.uint8).reshape(6, 8)
COLOR = np.stack([GREY, GREY[::-1], 255 - GREY], -1)
ALPHA = np.where(np.arange(48).reshape(6, 8) % 3 == 0, 0, 255).astype(np.uint8)
LAYERED = np.concatenate([COLOR, ALPHA[..., None]], -1)
PALETTE = Image.fromarray(COLOR).quantize(48)


def on_white(layered):
    share = layered[..., 3:] / 255
    return (layered[..., :3] * share + 255 * (1 - share)).round().astype(np.uint8)


def turned(image, path):
    exif = Image.Exif()
    exif[274] = 6  # turn by 90 degrees clockwise to see it upright
    image.save(path, exif=exif, quality=100, subsampling=0)
    return path


PICTURES = {
    "RGB": (Image.fromarray(COLOR), COLOR),
    "L": (Image.fromarray(GREY), np.stack([GREY] * 3, -1)),
    "1": (Image.fromarray(GREY > 99), np.stack([(GREY > 99) * np.uint8(255)] * 3, -1)),
    "I;16": (Image.fromarray(GREY.astype(np.uint16) * 257), np.stack([GREY] * 3, -1)),
    "I": (Image.fromarray(GREY.astype(np.int32) * 257), np.stack([GREY] * 3, -1)),
    "RGBA": (Image.fromarray(LAYERED), on_white(LAYERED)),
    "LA": (Image.fromarray(LAYERED[..., [0, 3]]), on_white(LAYERED[..., [0, 0, 0, 3]])),
    "P": (PALETTE, np.asarray(PALETTE.convert("RGB"))),
    "CMYK": (Image.fromarray(COLOR).convert("CMYK"), np.asarray(Image.fromarray(COLOR).convert("CMYK").convert("RGB"))),
}
LAYERED_PALETTE = Image.fromarray(LAYERED).quantize(48, method=Image.Quantize.FASTOCTREE)
#: modes that no file has but that programs make
OPENED = {
    "bytes as I": (Image.fromarray(GREY).convert("I"), PICTURES["L"][1]),
    "bytes as F": (Image.fromarray(GREY).convert("F"), PICTURES["L"][1]),
    "floats": (Image.fromarray((GREY / 255).astype(np.float32)), PICTURES["L"][1]),
    "La": (PICTURES["LA"][0].convert("La"), PICTURES["LA"][1]),
    "PA": (PICTURES["LA"][0].convert("RGBA").convert("PA"), PICTURES["LA"][1]),
    "a palette with transparency": (LAYERED_PALETTE, on_white(np.asarray(LAYERED_PALETTE.convert("RGBA")))),
}


@pytest.mark.parametrize("mode", OPENED)
def test_a_picture_in_the_modes_of_programs(mode):
    picture, expected = OPENED[mode]
    np.testing.assert_allclose(read(as_pixels(picture, None)).astype(int), expected, atol=mode in ("La", "PA"))


@pytest.mark.parametrize(
    "grey", [GREY * 257.0, GREY - 1.0, np.where(GREY > 99, np.nan, GREY / 255)], ids=["16 bits", "below 0", "nan"]
)
def test_deep_greys_out_of_range_are_refused_as_arrays_are(grey):
    for reader in (lambda given: as_pixels(given, None), masks.read_mask):
        with pytest.raises(BadInput, match=r"from \S+ to \S+|finite numbers"):
            reader(Image.fromarray(grey.astype(np.float32)))


def read(pixels):
    return ((pixels[0].permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy()


@pytest.mark.parametrize("mode", PICTURES)
def test_a_picture_in_every_mode(mode, tmp_path):
    picture, expected = PICTURES[mode]
    np.testing.assert_array_equal(read(as_pixels(picture, None)), expected)
    path = tmp_path / ("a.tif" if mode in ("CMYK", "I") else "a.png")
    picture.save(path)
    np.testing.assert_array_equal(np.asarray(read_picture(path)), expected)
    with Image.open(path) as opened:
        np.testing.assert_array_equal(read(as_pixels(opened, None)), expected)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (COLOR, COLOR),
        (GREY, np.stack([GREY] * 3, -1)),
        (GREY[..., None], np.stack([GREY] * 3, -1)),
        (GREY.astype(np.uint16) * 257, np.stack([GREY] * 3, -1)),
        (COLOR.astype(np.int64), COLOR),
        ((COLOR / 255).astype(np.float32), COLOR),
        (LAYERED, on_white(LAYERED)),
        (GREY > 99, np.stack([(GREY > 99) * np.uint8(255)] * 3, -1)),
        (GREY[None], np.stack([GREY] * 3, -1)),
        (COLOR[None], COLOR),
        (GREY.astype(np.int64) * 257, np.stack([GREY] * 3, -1)),
        (GREY.astype(">u2") * 257, np.stack([GREY] * 3, -1)),
        ((GREY / 255 * 1.0005).astype(np.float16), np.stack([GREY] * 3, -1)),
    ],
)
def test_arrays_are_pictures(array, expected):
    np.testing.assert_array_equal(read(as_pixels(array, None)), expected)


@pytest.mark.parametrize(
    "array",
    [
        COLOR - 300.0,
        np.full((4, 4), np.nan),
        np.zeros((4, 0)),
        np.zeros((2, 4, 5)),
        COLOR.astype(np.int32) * 900,
        np.array("x"),
        np.ma.masked_array(GREY, GREY > 99),
    ],
)
def test_other_arrays_are_refused_in_one_line(array):
    with pytest.raises(BadInput, match="^image is an array [^\n]*$"):
        as_pixels(array, None)


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (torch.full((1, 3, 4, 4), 200, dtype=torch.uint8), "a tensor of torch.uint8; it must hold floats"),
        (torch.full((1, 3, 4, 4), 200.0), "from 200 to 200; a tensor must lie in"),
        (torch.full((1, 3, 4, 4), float("nan")), "not finite"),
        (torch.zeros(3, 4, 4), "has shape"),
    ],
)
def test_tensors_that_are_no_pixels(tensor, says):
    with pytest.raises(BadInput, match=f"^image .*{says}"):
        as_pixels(tensor, None)


def test_an_upright_picture_however_it_is_opened(tmp_path):
    path = turned(Image.fromarray(COLOR), tmp_path / "a.jpg")
    upright = np.asarray(read_picture(path))
    assert upright.shape == (8, 6, 3)
    with Image.open(path) as opened:
        np.testing.assert_array_equal(read(as_pixels(opened, None)), upright)
        np.testing.assert_array_equal(masks.read_mask(opened), masks.read_mask(path))
    assert masks.read_mask(path).shape == (8, 6)


@pytest.mark.parametrize(
    "given",
    [
        Image.fromarray(GREY),
        Image.fromarray(GREY.astype(np.uint16) * 257),
        Image.fromarray((GREY / 255).astype(np.float32)),
        Image.fromarray(np.stack([GREY] * 3, -1)),
        Image.fromarray(np.stack([np.full_like(GREY, 255)] * 3 + [GREY], -1)),
        GREY,
        GREY[None],
        GREY.astype(np.uint16) * 257,
        (GREY / 255).astype(np.float32),
        torch.from_numpy(GREY),
        torch.from_numpy(GREY / 255),
        Image.fromarray(GREY).convert("I"),
        GREY.astype(np.int64) * 257,
        GREY / 255 * 1.0005,
    ],
    ids="L I;16 F RGB RGBA bytes layer 16bit floats tensor-bytes tensor-floats I int64 rounded".split(),
)
def test_a_mask_in_every_form(given, tmp_path):
    expected = torch.from_numpy(GREY.astype(np.float32) / 255)
    torch.testing.assert_close(masks.read_mask(given), expected, atol=6e-4, rtol=0)
    if isinstance(given, Image.Image):
        path = tmp_path / ("a.tif" if given.mode in "FI" else "a.png")
        given.save(path)
        torch.testing.assert_close(masks.read_mask(path), expected, atol=1e-6, rtol=0)


def test_premultiplied_grey_is_read_by_every_reader():
    grey = Image.merge("LA", [Image.new("L", (4, 4), 200), Image.new("L", (4, 4), 255)]).convert("La")
    read = (masks.read_labels(grey), masks.read_mask(grey) * 255, (as_pixels(grey, None)[0, 0] + 1) * 127.5)
    assert all(int(each.float().mean().round()) == 200 for each in read)


def test_a_masked_array_is_filled_first():
    hidden = np.ma.masked_array(GREY, GREY > 99)
    for reader in (masks.read_mask, masks.read_labels, lambda given: as_pixels(given, None)):
        with pytest.raises(BadInput, match="some values are hidden; give array.filled"):
            reader(hidden)
        assert torch.equal(reader(hidden.filled(0)), reader(np.where(GREY > 99, 0, GREY).astype(np.uint8)))


PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))


@pytest.mark.parametrize(("kind", "system"), [("inpaint", Inpaint), ("sd", Blend), ("sd3", Blend)])
def test_a_mask_means_the_same_to_every_system(kind, system):
    """Nowhere light enough: refused by all. A thin line: the cells that it covers most, also among the pixels."""
    model = tiny_model(kind)

    def draw(mask, **more):
        systems = system(mask=mask, paste=0, **more)
        return generate(model, "a red cube", image=PHOTO, strength=1.0, steps=2, seed=3, interventions=systems)

    dark = np.full((32, 32), 120, dtype=np.uint8)
    dark[:8] = 0
    with pytest.raises(BadInput, match="nowhere lighter than 0.47"):
        draw(dark)
    changed = np.asarray(draw(dark, level=0.4).images[0]) != np.asarray(PHOTO)
    assert changed[8:].any() and not changed[:8].any()
    line = np.zeros((320, 320), dtype=np.uint8)
    line[160:163] = 255  # a third of a pixel high
    changed = (np.asarray(draw(line).images[0]) != np.asarray(PHOTO)).any((1, 2))
    assert changed.any() and set(np.flatnonzero(changed)) <= {15, 16, 17}


# --- damaged ones -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_damaged_pictures_are_refused_or_read(kind, tmp_path):
    """Any byte may be another one, of the picture or of what it says about itself; no error is that of a library."""
    noise = np.random.default_rng(0).integers(0, 255, (20, 24, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a cube"
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + "a cube\nSteps: 2".encode("utf-16-be")
    whole = io.BytesIO()
    Image.fromarray(noise).save(whole, kind, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP", "TIFF") else {}))
    random_ = random.Random(0)
    path, read = tmp_path / "x", 0
    for _ in range(80):
        content = bytearray(whole.getvalue())
        for _ in range(random_.choice((1, 2, 20))):
            content[random_.randrange(min(len(content), random_.choice((60, 200, 10_000))))] = random_.randrange(256)
        path.write_bytes(content[: random_.choice((len(content), random_.randrange(len(content))))])
        embedded = masks.EMBEDDED + base64.b64encode(path.read_bytes()).decode()
        for look in (files.read_picture, files.read_recipe, lambda _: masks.read_mask(embedded)):  # noqa: B023
            with contextlib.suppress(BadInput):
                look(path)
                read += 1
    assert 0 < read < 240


def test_damaged_exif_does_not_keep_a_picture_from_being_read(tmp_path):
    image = Image.new("RGB", (6, 4), "red")
    image.info["exif"] = b"Exif\0\0MN\0*\0\0\0\x08"
    assert files.as_rgb(image).size == size_of(image) == (6, 4) and files.orientation(image) == 1
