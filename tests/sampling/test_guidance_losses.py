"""Distances, crops and weights in CLIP's space by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sfumato.errors import BadInput
from sfumato.sampling.guidance_losses import (
    Cutouts,
    log_probability,
    out_of_range,
    shares,
    total_variation,
    weighted,
)


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def test_log_probability_is_the_cross_entropy_of_the_own_class():
    seen, own, rivals = unit(3, 6), unit(3, 6, seed=1), unit(4, 6, seed=2)
    for i, value in enumerate(log_probability(seen, own, rivals, 7.0)):
        logits = torch.stack([seen[i] @ own[i], *(seen[i] @ rival for rival in rivals)]) * 7
        assert float(-F.cross_entropy(logits[None], torch.tensor([0]))) == pytest.approx(float(value))


def test_total_variation_and_range_by_hand():
    pixels = torch.tensor([[[[0.0, 2.0], [0.5, -1.5]]] * 3])
    right, down = (2.0**2 + 2.0**2) / 2, (0.5**2 + 3.5**2) / 2
    assert float(total_variation(pixels)) == pytest.approx(right + down)
    assert float(out_of_range(pixels)) == pytest.approx((1.0 + 0.25) / 4)


@pytest.mark.parametrize("size", [(64, 64), (40, 96)])
def test_cutouts_lie_inside_and_favour_large_ones(size):
    boxes = Cutouts(2000, power=0.5, smallest=0.5).draw(size, torch.Generator().manual_seed(0))
    sides = torch.tensor([side for _, _, side in boxes]).double() / min(size)
    assert (
        all(0 <= top <= size[0] - side and 0 <= left <= size[1] - side for top, left, side in boxes)
        and sides.min() >= 0.5
    )
    # the mean of u^power is 1 / (power + 1); sides are rounded down to pixels
    assert sides.mean().item() == pytest.approx(0.5 + 0.5 * 2 / 3, abs=0.03)
    tops = torch.tensor([top / (size[0] - side) for top, _, side in boxes if side < size[0]])
    assert tops.mean().item() == pytest.approx(0.5, abs=0.05)


def test_a_cutout_of_the_right_size_is_the_picture_itself():
    picture = torch.randn(3, 20, 30, generator=torch.Generator().manual_seed(0))
    crops = Cutouts(2).cut(picture, [(3, 5, 8), (0, 0, 20)], 8)
    assert crops.shape == (2, 3, 8, 8) and torch.equal(crops[0], picture[:, 3:11, 5:13])


def test_weights_are_read_and_shared():
    assert weighted("a red ball:0.5") == ("a red ball", 0.5)
    assert weighted("a scale of 1:x") == ("a scale of 1:x", 1.0)
    assert weighted("C:/art/x.png:-2") == ("C:/art/x.png", -2.0)
    assert shares([1.0, 3.0], "t") == [0.25, 0.75] and shares([1.0, -3.0], "t") == [0.5, -1.5]
    for bad in ("a ball:nan", "a ball:inf", "", "  "):
        with pytest.raises(BadInput):
            weighted(bad)
    with pytest.raises(BadInput, match="add up to zero"):
        shares([1.0, -1.0], "t")
