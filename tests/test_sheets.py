"""Contact sheets: every picture where it belongs, labels beside it, nothing lost."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato import sheets
from sfumato.errors import BadInput


def flat(color, size=(40, 30)):
    return Image.new("RGB", size, color)


def test_cells_lie_in_rows_with_gaps():
    cells = [flat("red"), flat("lime"), flat("blue")]
    page = np.asarray(sheets.sheet(cells, 2))
    assert page.shape == (2 * 30 + 4, 2 * 40 + 4, 3)
    assert (page[:30, :40] == (255, 0, 0)).all() and (page[:30, 44:] == (0, 255, 0)).all()
    assert (page[34:, :40] == (0, 0, 255)).all()
    assert (page[34:, 40:] == 255).all() and (page[30:34] == 255).all()


def test_tensors_arrays_and_pictures_are_the_same():
    bytes_ = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    tensor = torch.from_numpy(bytes_).permute(2, 0, 1).float() / 127.5 - 1
    for one in (bytes_, tensor, Image.fromarray(bytes_)):
        assert np.array_equal(np.asarray(sheets.sheet([one], 1)), bytes_)
    twice = np.asarray(sheets.sheet([bytes_], 1, scale=2))
    assert np.array_equal(twice, bytes_.repeat(2, 0).repeat(2, 1))
    for wrong in (torch.zeros(4, 5, 6), np.zeros((3, 4)), "x.png"):
        with pytest.raises(BadInput, match="is no picture"):
            sheets.sheet([wrong])


def test_sizes_may_differ_and_places_may_be_empty():
    page = np.asarray(
        sheets.sheet([flat("red", (10, 10)), flat("blue", (30, 20)), None, flat("lime", (8, 8))], 2, gap=0)
    )
    assert page.shape == (28, 40, 3)
    assert (page[:10, :10] == (255, 0, 0)).all() and (page[20:28, :10] == 255).all()
    assert (page[20:28, 10:18] == (0, 255, 0)).all()
    with pytest.raises(BadInput, match="at least one picture"):
        sheets.sheet([None, None])


def dark(page):
    """Where something is written: (y, x) of pixels that are nearly black."""
    return np.argwhere(page.max(-1) < 60)


def test_labels_are_written_beside_their_pictures():
    cells = [("left", flat("yellow", (90, 60))), ("right", flat("yellow", (90, 60)))]
    page = np.asarray(sheets.sheet(cells, 2, title="what it is", rows=["one row"], heads=["head a", "head b"]))
    yellow = np.argwhere((page == (255, 255, 0)).all(-1))
    top, left = yellow.min(0)
    assert len(yellow) == 2 * 90 * 60  # nothing is painted over
    ink = dark(page)
    assert (ink[:, 0] < top).any() and ((ink[:, 1] < left) & (ink[:, 0] > top)).any()
    for a, b in ((left, left + 90), (left + 98, left + 188)):  # each label over its own picture
        assert ((ink[:, 1] >= a) & (ink[:, 1] < b) & (ink[:, 0] < top) & (ink[:, 0] > top - 17)).any()


def test_long_labels_are_cut_and_titles_wrapped():
    cell = flat("gray", (60, 60))
    long = sheets.sheet([("a very long label that cannot fit into the cell", cell)], title="word " * 300)
    short = sheets.sheet([("猫 🐱", cell)])
    assert long.width == short.width and long.height > short.height


def test_a_strip_holds_the_first_and_the_last_frame():
    assert sheets.strip(range(5)) == [0, 1, 2, 3, 4]
    assert sheets.strip(range(16), 4) == [0, 5, 10, 15]
    assert sheets.strip(range(16), 1) == [0]
