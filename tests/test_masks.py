"""Masks from every kind of file and array, on every grid, against slow references."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage, optimize

from sfumato import mask_ops, masks
from sfumato.cards import Params
from sfumato.errors import BadInput, NoMatch

RNG = np.random.default_rng(3)
SHAPE = np.zeros((12, 20), bool)
SHAPE[3:9, 5:16] = True
SHAPE[5, 7] = False


def same(mask, expected=SHAPE):
    return torch.equal(mask, torch.from_numpy(np.asarray(expected, np.float32)))


# --- reading ---------------------------------------------------------------------------------------------------------


def pictures():
    on = SHAPE.astype(np.uint8)
    yield "binary", Image.fromarray(SHAPE)
    yield "grey", Image.fromarray(on * 255)
    yield "zeros and ones", Image.fromarray(on)
    yield "16 bit", Image.fromarray(on.astype(np.uint16) * 65535)
    yield "32 bit", Image.fromarray(on.astype(np.int32) * 65535)
    yield "float", Image.fromarray(on.astype(np.float32))
    yield "float to 255", Image.fromarray(on.astype(np.float32) * 255)
    paint = np.zeros((*SHAPE.shape, 3), np.uint8)
    paint[SHAPE] = (0, 0, 255)
    yield "blue paint on black", Image.fromarray(paint)
    yield "cmyk", Image.fromarray(on * 255).convert("RGB").convert("CMYK")
    palette = Image.fromarray(on)
    palette = palette.convert("P")
    palette.putpalette([0, 0, 0, 255, 0, 0] + [0] * 762)
    palette.putdata(on.flatten().tolist())
    yield "palette", palette
    for name, color in (("white", 255), ("black", 0), ("red", (200, 10, 10))):
        layer = np.zeros((*SHAPE.shape, 4), np.uint8)
        layer[SHAPE, :3], layer[SHAPE, 3] = color, 255
        yield f"{name} on a transparent layer", Image.fromarray(layer)
    yield "grey with alpha", Image.fromarray(np.stack([on * 0 + 255, on * 255], -1), "LA")
    opaque = np.dstack([on * 255] * 3 + [on * 0 + 255])
    yield "opaque alpha", Image.fromarray(opaque)


@pytest.mark.parametrize(("name", "picture"), list(pictures()), ids=lambda each: each if isinstance(each, str) else "")
def test_every_kind_of_picture_is_the_same_mask(name, picture, tmp_path):
    assert same(masks.read_mask(picture))
    file = tmp_path / ("mask.tif" if picture.mode in ("F", "I", "CMYK") else "mask.png")
    picture.save(file)
    assert same(masks.read_mask(file)) and same(masks.read_mask(str(file)))


def test_arrays_and_tensors():
    on = SHAPE.astype(np.uint8)
    for given in (SHAPE, on, on * 255, on.astype(np.int64), on.astype(float), on[None], on[..., None], on[None, None]):
        assert same(masks.read_mask(given))
    for given in (torch.from_numpy(SHAPE), torch.from_numpy(on)[None], torch.from_numpy(on).bfloat16()):
        assert same(masks.read_mask(given))
    assert same(masks.read_mask(on.astype(np.uint16) * 65535)) and same(masks.read_mask(np.dstack([on * 255] * 3)))
    soft = RNG.random((5, 7)).astype(np.float32)
    assert torch.equal(masks.read_mask(soft), torch.from_numpy(soft))


def test_grey_levels_and_depth_are_kept(tmp_path):
    ramp = np.linspace(0, 65535, 4096).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    assert len(masks.read_mask(tmp_path / "deep.png").unique()) == 4096


def test_exif_turns_the_mask_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(SHAPE.astype(np.uint8) * 255).save(tmp_path / "turned.png", exif=exif)
    assert same(masks.read_mask(tmp_path / "turned.png"), np.rot90(SHAPE, -1))


def test_texts_bring_the_mask_back():
    for given in (SHAPE, Image.fromarray(SHAPE), torch.from_numpy(SHAPE)):
        text = masks.as_text(given)
        assert text.startswith("data:image/png;base64,") and "\n" not in text and same(masks.read_mask(text))
        assert masks.as_text(text) == text
    colors = RNG.integers(0, 256, (6, 5, 3)).astype(np.uint8)
    assert np.array_equal(masks.read_labels(masks.as_text(colors, labels=True)).numpy(), colors)


def test_parameters_take_everything():
    class Some(Params):
        mask: masks.MaskTexts = []
        box: masks.Boxes = []

    assert Some(mask="a.png").mask == ["a.png"] and Some(mask=["a.png", "b.png"]).mask == ["a.png", "b.png"]
    assert same(masks.read_mask(Some(mask=SHAPE).mask[0]))
    assert Some(box=["0", "0.5", "1", "1"]).box == [(0, 0.5, 1, 1)]
    assert len(Some(box=[[0, 0, 1, 1], [0, 0.5, 1, 1]]).box) == 2
    with pytest.raises(BadInput, match="box"):
        Some(box=[0, 0, 1])


def bad_masks(folder):
    Image.fromarray(RNG.integers(0, 255, (64, 64, 3)).astype(np.uint8)).save(folder / "whole.jpg")
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:900])
    (folder / "text.png").write_text("no picture")
    (folder / "empty.png").write_bytes(b"")
    erased = RNG.integers(0, 255, (8, 8, 4)).astype(np.uint8)
    Image.fromarray(erased).save(folder / "erased.png")
    yield folder / "missing.png", "is no file"
    yield folder, "is no file"
    yield folder / "cut.jpg", "cannot be read"
    yield folder / "text.png", "cannot be read"
    yield folder / "empty.png", "cannot be read"
    yield folder / "erased.png", "transparency"
    yield "data:image/png;base64,AAAA", "cannot be read"
    yield "data:image/png;base64,A", "cannot be read"
    yield "data:text/plain,hello", "not understood"
    yield np.full((4, 4), 1.5), r"in \[0, 1\]"
    yield np.full((4, 4), np.nan), "finite"
    yield np.full((4, 4), -3), "holds values from -3"
    yield np.zeros((2, 5, 5)), "shape"
    yield np.zeros((0, 4)), "shape"
    yield np.array([["a"]]), "finite numbers"
    yield 7, "it must be a file"
    yield None, "it must be a file"


def test_bad_masks_are_one_line(tmp_path):
    for given, said in bad_masks(tmp_path):
        with pytest.raises(BadInput, match=said) as caught:
            masks.read_mask(given)
        assert "\n" not in str(caught.value) and str(caught.value).startswith(("mask", str(tmp_path)))


def test_pictures_too_large_are_refused(monkeypatch):
    monkeypatch.setattr(masks.files, "MOST_PIXELS", 100)
    with pytest.raises(BadInput, match="too large"):
        masks.read_mask(Image.new("L", (11, 10)))


# --- boxes and label maps --------------------------------------------------------------------------------------------


def test_boxes_in_fractions_and_pixels():
    assert torch.equal(masks.box_mask((0.25, 0.5, 0.75, 1), (8, 4)), masks.box_mask((2, 2, 6, 4), (8, 4)))
    cut = masks.box_mask((0.5, 0.25, 3, 2.5), (4, 4))  # 2.5 by 2.25 pixels
    assert cut[1].tolist() == [0.5, 1, 1, 0] and cut[:, 0].tolist() == [0.375, 0.5, 0.25, 0]
    assert cut.sum().item() == pytest.approx(2.5 * 2.25)
    assert masks.box_mask((0, 0, 1, 1), (5, 3)).min() == 1
    for box in ((0.5, 0, 0.5, 1), (0.6, 0, 0.2, 1), (0, 0, 9, 4), (-0.1, 0, 0.5, 1)):
        with pytest.raises(BadInput, match=r"x0\|y0\|x1\|y1"):
            masks.box_mask(box, (8, 4))


def test_label_maps():
    paint = np.zeros((6, 6, 3), np.uint8)
    paint[:, 3:] = (255, 0, 0)
    paint[4:, :2] = (10, 130, 5)
    layers = masks.label_regions(masks.read_labels(paint), ["red", "#008000", "000000"])
    assert layers.sum((1, 2)).tolist() == [18, 4, 14] and layers.max() == 1
    with pytest.raises(NoMatch, match="#ff0000"):
        masks.label_regions(masks.read_labels(paint), ["blue"])
    with pytest.raises(BadInput, match="hex code"):
        masks.label_regions(masks.read_labels(paint), ["reddish"])
    layered = np.zeros((2, 2, 4), np.uint8)
    layered[0, 0] = (9, 8, 7, 255)
    assert masks.read_labels(Image.fromarray(layered))[0].tolist() == [[9, 8, 7], [0, 0, 0]]
    with pytest.raises(BadInput, match="uint8"):
        masks.read_labels(np.zeros((4, 4)))


def test_masks_and_boxes_become_layers():
    layers = masks.regions([torch.ones(3, 3), torch.zeros(9, 9)], [(0, 0, 0.5, 1)], (8, 4))
    assert layers.shape == (3, 4, 8) and layers.mean((1, 2)).tolist() == [1, 0, 0.5]
    assert masks.regions([], [], (8, 4)).shape == (0, 4, 8)


# --- grids -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(4, 5), (5, 3), (24, 40), (13, 21), (1, 1), (12, 20)])
def test_area_is_the_mean_over_each_cell(grid):
    mask = torch.from_numpy(RNG.random((12, 20)).astype(np.float32))
    n, m = np.lcm(12, grid[0]), np.lcm(20, grid[1])
    fine = mask.double().repeat_interleave(n // 12, 0).repeat_interleave(m // 20, 1)
    expected = fine.reshape(grid[0], n // grid[0], grid[1], m // grid[1]).mean((1, 3)).float()
    torch.testing.assert_close(mask_ops.area(mask, grid), expected)
    torch.testing.assert_close(mask_ops.area(mask, grid).mean(), mask.mean())


def test_cells_belong_from_half_their_area_on_and_thin_masks_do_not_vanish():
    mask = torch.zeros(8, 8)
    mask[:, :5] = 1
    assert mask_ops.on_grid(mask, (2, 2)).tolist() == [[1, 0], [1, 0]]
    assert mask_ops.on_grid(mask, (2, 2), level=0.25).tolist() == [[1, 1], [1, 1]]
    assert mask_ops.on_grid(mask, (2, 2), soft=True).tolist() == [[1, 0.25], [1, 0.25]]
    line = torch.zeros(2, 16, 16)
    line[0, :, 3] = 1
    thin = mask_ops.on_grid(line, (4, 4))
    assert thin[0, :, 0].tolist() == [1, 1, 1, 1] and thin.sum() == 4
    assert mask_ops.on_grid(torch.ones(4, 4), (2, 2)).min() == 1


@pytest.mark.parametrize("cells", [1, 2])
def test_growing_shrinking_closing_and_filling_like_scipy(cells):
    blobs = ndimage.gaussian_filter(RNG.random((30, 40)), 1.2) > 0.5
    mask = torch.from_numpy(blobs.astype(np.float32))
    square = np.ones((2 * cells + 1,) * 2, bool)
    assert same(mask_ops.dilate(mask, cells), ndimage.binary_dilation(blobs, square))
    assert same(mask_ops.dilate(mask, -cells), ndimage.binary_erosion(blobs, square, border_value=1))
    closed = ndimage.binary_erosion(ndimage.binary_dilation(blobs, square), square, border_value=1)
    assert same(mask_ops.close(mask, cells), closed)
    soft = torch.from_numpy(RNG.random((9, 11)).astype(np.float32))
    grown = ndimage.grey_dilation(soft.numpy(), size=square.shape, mode="nearest")
    assert same(mask_ops.dilate(soft, cells), grown) and mask_ops.dilate(soft, 0) is soft


def test_holes_are_filled():
    ring = torch.ones(7, 7)
    ring[2:5, 2:5] = 0
    assert mask_ops.fill_holes(ring).min() == 1
    ring[0:3, 3] = 0  # now it is open
    assert torch.equal(mask_ops.fill_holes(ring), ring)


def test_feathers_fall_in_a_straight_line():
    mask = torch.from_numpy(SHAPE.astype(np.float32))
    on = np.argwhere(SHAPE)
    away = np.array([[np.hypot(*(on - (y, x)).T).min() for x in range(20)] for y in range(12)])
    expected = torch.from_numpy(np.clip(1 - away / 3, 0, 1).astype(np.float32))
    torch.testing.assert_close(mask_ops.feather(mask, 3), expected)
    assert torch.equal(mask_ops.feather(mask, 0), mask) and mask_ops.feather(mask * 0, 3).max() == 0


# --- thresholds ------------------------------------------------------------------------------------------------------


def test_mixture_threshold_is_that_of_the_likeliest_mixture():
    x = np.concatenate([RNG.normal(0.2, 0.05, 700), RNG.normal(0.6, 0.1, 300)])

    def unlikely(p):
        share = 1 / (1 + np.exp(-p[0]))
        parts = [
            weight * np.exp(-((x - mean) ** 2) / (2 * np.exp(2 * log_width))) / np.exp(log_width)
            for weight, mean, log_width in ((share, p[1], p[2]), (1 - share, p[3], p[4]))
        ]
        return -np.log(sum(parts)).mean()

    best = optimize.minimize(unlikely, [0.5, 0.1, -3, 0.7, -2], method="Nelder-Mead", options={"maxiter": 4000})
    found = mask_ops.mixture_threshold(torch.from_numpy(x).reshape(10, 100))
    assert found == pytest.approx((best.x[1] + best.x[3]) / 2, abs=2e-3)


def test_otsu_parts_best_of_all_thresholds():
    x = torch.from_numpy(np.concatenate([RNG.normal(0, 1, 500), RNG.normal(5, 1, 400)]))

    def within(threshold):
        parts = [x[x < threshold], x[x >= threshold]]
        return sum(len(part) * part.var(unbiased=False).item() for part in parts if len(part))

    found = mask_ops.otsu_threshold(x)
    assert within(found) <= min(within(t) for t in np.linspace(0.5, 4.5, 400)) * 1.002
    with pytest.raises(NoMatch, match="everywhere"):
        mask_ops.mixture_threshold(torch.full((4, 4), 2.0))


def test_two_values_are_parted_between_them():
    x = torch.tensor([0.0] * 50 + [1.0] * 3)
    assert 0 < mask_ops.mixture_threshold(x) < 1
