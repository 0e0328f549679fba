"""Regions: pixels inside boxes, overlaps, fillings."""

from __future__ import annotations

import pytest
import torch

from sfumato.errors import BadInput
from sfumato.models.readers.regions import box_overlap, fill_regions, region_features


def test_features_are_the_pixels_inside():
    image = torch.arange(64.0).view(1, 1, 8, 8).expand(1, 3, 8, 8)
    boxes = torch.tensor([[[0.0, 0.0, 1.0, 1.0], [0.5, 0.25, 1.0, 0.75]]])
    found = region_features(image, boxes, 8)
    assert torch.allclose(found[0, 0].view(3, 8, 8), image[0])
    half = region_features(image, boxes, 4)[0, 1].view(3, 4, 4)
    assert torch.allclose(half, image[0, :, 2:6, 4:8])
    with pytest.raises(BadInput, match="boxes"):
        region_features(image, boxes.expand(2, -1, -1), 4)


def test_overlap():
    a = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.5, 1.0]])
    assert torch.allclose(box_overlap(a, a), torch.tensor([[1.0, 0.5], [0.5, 1.0]]))
    assert not box_overlap(a[:1], a[:1] + 2).any()


def test_filling_keeps_what_was_found_and_avoids_it():
    found = torch.tensor([[0.0, 0.0, 0.25, 0.25]])
    filled = fill_regions(found, 8)
    assert filled.shape == (8, 4) and torch.equal(filled[:1], found)
    assert float(box_overlap(filled[1:], found).max()) < 0.3
    assert fill_regions(torch.zeros(0, 4), 8).shape == (8, 4)
    with pytest.raises(BadInput, match="2 regions"):
        fill_regions(filled[:2], 1)
