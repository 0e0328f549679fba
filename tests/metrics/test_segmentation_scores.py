"""Average precision and Otsu's threshold against slow references."""

from __future__ import annotations

import pytest
import torch

from sfumato.metrics import segmentation


def test_average_precision_against_counting():
    heat = torch.rand(4, 5, 5, generator=torch.Generator().manual_seed(0)).mul(8).round()  # with many ties
    truth = torch.rand(4, 5, 5, generator=torch.Generator().manual_seed(1)) > 0.6
    for value, h, t in zip(segmentation.average_precision(heat, truth), heat, truth, strict=True):
        total, before = 0.0, 0.0
        for level in sorted(set(h.flatten().tolist()), reverse=True):
            chosen = h >= level
            recall, precision = float((chosen & t).sum() / t.sum()), float((chosen & t).sum() / chosen.sum())
            total += (recall - before) * precision
            before = recall
        assert float(value) == pytest.approx(total)
    flat = segmentation.average_precision(torch.ones(1, 5, 5), truth[:1])
    assert float(flat) == pytest.approx(float(truth[0].float().mean()))
    assert segmentation.average_precision(heat[:1], torch.zeros(1, 5, 5, dtype=torch.bool)).isnan().all()


def test_otsu_splits_two_heaps():
    heat = torch.cat([torch.full((1, 4, 8), 0.1), torch.full((1, 4, 8), 0.8)], 1)
    heat += 0.02 * torch.rand(heat.shape, generator=torch.Generator().manual_seed(0))
    mask = segmentation.normalise(heat) > segmentation.otsu(heat)[:, None, None]
    assert not mask[0, :4].any() and mask[0, 4:].all()
    assert float(segmentation.otsu(torch.ones(1, 3, 3))) == 0


def test_otsu_against_a_search():
    heat = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(2)) ** 3
    for level, each in zip(segmentation.otsu(heat), segmentation.normalise(heat), strict=True):
        values = (each.flatten() * 255).round().double()

        def between(cut, values=values):
            low, high = values[values <= cut], values[values > cut]
            if not len(low) or not len(high):
                return -1.0
            return float(len(low) * len(high) * (low.mean() - high.mean()) ** 2)

        best = max(between(cut) for cut in range(256))
        assert between(float(level) * 255 - 0.5) == pytest.approx(best)


def test_instance_average_precision():
    a, b = torch.zeros(2, 4, 4, dtype=torch.bool), torch.zeros(1, 4, 4, dtype=torch.bool)
    a[0, :2], a[1, 2:], b[0, 0] = True, True, True
    ap = segmentation.instance_ap
    assert ap([a], [a], [torch.tensor([0.9, 0.8])], 0.5) == 1
    assert ap([a[:1]], [a], [torch.tensor([0.9])], 0.5) == 0.5
    twice = a[[0, 0, 1]]  # the second find of the same toy is wrong
    assert ap([twice], [a], [torch.tensor([0.9, 0.8, 0.7])], 0.5) == pytest.approx((1 + 2 / 3) / 2)
    assert ap([b], [a], [torch.tensor([0.9])], 0.6) == 0 and ap([b], [a], [torch.tensor([0.9])], 0.5) == 0.5
