"""Segmentation scores against loops over pixels."""

from __future__ import annotations

import pytest
import torch

from sfumato.errors import BadInput
from sfumato.metrics import segmentation as seg


def slow_iou(first, second):
    joint = union = 0
    for a, b in zip(first.flatten().tolist(), second.flatten().tolist(), strict=True):
        joint += a and b
        union += a or b
    return joint / union if union else 1.0


@pytest.fixture
def pairs():
    generator = torch.Generator().manual_seed(0)
    first = torch.rand(6, 9, 7, generator=generator) > 0.6
    second = torch.rand(6, 9, 7, generator=generator) > 0.5
    first[4], second[5] = False, False
    first[5] = False
    return first, second


def test_iou(pairs):
    expected = [slow_iou(a, b) for a, b in zip(*pairs, strict=True)]
    assert seg.iou(*pairs).tolist() == pytest.approx(expected)
    assert seg.iou(*pairs)[5] == 1.0


def test_overlap(pairs):
    iou, iod, ioh = seg.overlap(*pairs)
    for i in range(4):
        head, dependent = pairs[0][i], pairs[1][i]
        joint = int((head & dependent).sum())
        assert iou[i] == pytest.approx(slow_iou(head, dependent))
        assert iod[i] == pytest.approx(joint / int(dependent.sum()))
        assert ioh[i] == pytest.approx(joint / int(head.sum()))
    assert iod[4] == ioh[4] == 0


def test_normalise():
    maps = torch.tensor([[[1.0, 3.0], [2.0, 5.0]], [[7.0, 7.0], [7.0, 7.0]]])
    assert seg.normalise(maps)[0].tolist() == [[0.0, 0.5], [0.25, 1.0]]
    assert seg.normalise(maps, "max")[0, 0, 0] == pytest.approx(0.2)
    assert seg.normalise(maps)[1].abs().sum() == 0
    with pytest.raises(BadInput, match="minmax"):
        seg.normalise(maps, "l2")


def test_pointing():
    maps = torch.zeros(2, 5, 5)
    maps[0, 1, 4] = 2.0
    truths = torch.zeros(2, 5, 5, dtype=torch.bool)
    truths[0, 1, 4] = True
    truths[1, 2, 2] = True  # a constant map points at the centre
    assert seg.pointing(maps, truths).tolist() == [True, True]
    assert seg.pointing(maps, ~truths).tolist() == [False, False]


def test_inside_share():
    maps = torch.tensor([[[1.0, 1.0], [2.0, -4.0]]])
    truths = torch.tensor([[[True, False], [False, True]]])
    assert seg.inside_share(maps, truths).tolist() == [0.25]


def test_threshold_is_found_and_scores():
    truths = torch.zeros(8, 16, 16, dtype=torch.bool)
    truths[:, 4:10, 5:11] = True
    # object at 0.6 +- 0.1, background below 0.45: only thresholds in between are perfect
    noise = torch.rand(8, 16, 16, generator=torch.Generator().manual_seed(1))
    maps = torch.where(truths, 0.55 + 0.45 * noise, 0.42 * noise)
    tau, miou = seg.fit_threshold(maps, truths)
    assert 0.4 <= tau <= 0.6 and miou > 0.99
    score = seg.score(maps, truths, tau)
    assert score.miou.value == pytest.approx(miou)
    assert score.pointing.value == 1.0 and score.pointing.n == 8
    assert seg.score(maps, truths, 0.95).miou.value < 0.3


def test_baselines():
    whole = seg.normalise(seg.whole_image(2, (8, 8))) >= 0.5
    assert whole.float().mean() == pytest.approx(63 / 64)
    blob = seg.centred_gaussian(1, (9, 9))[0]
    assert blob.argmax() == 40 and torch.equal(blob, blob.flip(0)) and torch.equal(blob, blob.T)
    assert torch.equal(seg.random_blobs(2, (8, 8), seed=3), seg.random_blobs(2, (8, 8), seed=3))


def test_shapes_are_checked():
    with pytest.raises(BadInput, match="shape"):
        seg.iou(torch.ones(1, 2, 2), torch.ones(1, 2, 3))
    with pytest.raises(BadInput, match="no maps"):
        seg.score(torch.ones(0, 2, 2), torch.ones(0, 2, 2), 0.5)
