"""Perturbation curves against a model whose parts' worth is known, and against a slow loop."""

from __future__ import annotations

import pytest
import torch

from sfumato.errors import BadInput, UnknownName
from sfumato.metrics.perturbation import FRACTIONS, perturb, pixel_score, ranks


def additive(worth: torch.Tensor):
    """A model that scores what its remaining parts are worth."""
    return lambda gone: (worth * ~gone).sum(1)


def test_curves_equal_a_slow_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    worth, relevance = torch.rand(5, 30, generator=generator), torch.rand(5, 30, generator=generator)
    curves = perturb(additive(worth), relevance)
    for order, sign in (("positive", -1), ("negative", 1)):
        for i in range(5):
            parts = sorted(range(30), key=lambda part, i=i, sign=sign: sign * float(relevance[i, part]))
            want = [float(sum(worth[i, part] for part in parts[round(30 * f) :])) for f in FRACTIONS]
            assert curves[order].scores[i].tolist() == pytest.approx(want, rel=1e-5)
            area = sum((a + b) / 2 for a, b in zip(want, want[1:], strict=False)) / (len(want) - 1)
            assert curves[order].areas[i] == pytest.approx(area, rel=1e-5)


def test_the_true_worth_is_the_best_order_and_its_opposite_the_worst() -> None:
    generator = torch.Generator().manual_seed(1)
    worth = torch.rand(40, 64, generator=generator)
    best, random = (perturb(additive(worth), r) for r in (worth, torch.rand(40, 64, generator=generator)))
    worst = perturb(additive(worth), -worth)
    assert best["positive"].auc.high < random["positive"].auc.low < worst["positive"].auc.low
    assert best["negative"].auc.low > random["negative"].auc.high > worst["negative"].auc.high
    assert best["positive"].areas == pytest.approx(worst["negative"].areas)


def test_everything_and_nothing_removed() -> None:
    worth = torch.ones(2, 10)
    curve = perturb(additive(worth), torch.rand(2, 10), (0.0, 0.5, 1.0))["positive"]
    assert curve.scores.tolist() == [[10, 5, 0], [10, 5, 0]]


def test_ties_are_broken_at_random_and_alike_in_any_batch() -> None:
    flat = torch.zeros(3, 100)
    place = ranks(flat, "positive")
    assert place[0].tolist() != sorted(place[0].tolist()) and sorted(place[0].tolist()) == list(range(100))
    assert not torch.equal(place[0], place[1])
    assert torch.equal(ranks(flat[:1], "positive"), place[:1])
    assert torch.equal(ranks(flat, "positive", seed=1)[0], place[1])  # sample i draws from seed + i


def test_fixed_parts_are_never_removed_and_do_not_count() -> None:
    fixed = torch.zeros(1, 12, dtype=torch.bool)
    fixed[0, [0, 11]] = True
    seen: list[torch.Tensor] = []
    perturb(lambda gone: seen.append(gone) or torch.zeros(1), torch.arange(12.0)[None], (0.5, 1.0), fixed)
    assert [int(gone.sum()) for gone in seen] == [5, 10, 5, 10]
    assert not any(gone[0, [0, 11]].any() for gone in seen)
    assert seen[0][0].nonzero().flatten().tolist() == [6, 7, 8, 9, 10]


def test_pixels_are_replaced_by_a_value_or_by_another_picture() -> None:
    images, other = torch.rand(3, 3, 4, 4), torch.rand(3, 3, 4, 4) + 5
    gone = torch.zeros(3, 16, dtype=torch.bool)
    gone[1, 5] = True
    shown: list[torch.Tensor] = []

    def classify(pixels: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        shown.append(pixels)
        return rows.float()

    assert pixel_score(classify, images, other, batch=2)(gone).tolist() == [0, 1, 2]
    pixels = torch.cat(shown)
    assert torch.equal(pixels[1, :, 1, 1], other[1, :, 1, 1])
    pixels[1, :, 1, 1] = images[1, :, 1, 1]
    assert torch.equal(pixels, images)
    shown.clear()
    pixel_score(classify, images, -1.0)(gone)
    assert shown[0][1, :, 1, 1].tolist() == [-1, -1, -1]


def test_bad_input_is_refused() -> None:
    score, relevance = additive(torch.ones(2, 4)), torch.rand(2, 4)
    with pytest.raises(UnknownName, match="positive"):
        ranks(relevance, "upwards")
    for fractions in ((0.5,), (0.5, 0.2), (0.5, 1.2)):
        with pytest.raises(BadInput, match="fractions"):
            perturb(score, relevance, fractions)
    with pytest.raises(BadInput, match="finite"):
        perturb(score, relevance / 0)
    with pytest.raises(BadInput, match=r"\(n, parts\)"):
        perturb(score, relevance[0])
    with pytest.raises(BadInput, match="fixed has shape"):
        perturb(score, relevance, fixed=torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(BadInput, match="fill has shape"):
        pixel_score(lambda x, rows: rows, torch.zeros(2, 3, 4, 4), torch.zeros(1, 3, 4, 4))
    with pytest.raises(BadInput, match="2 pictures of 4 x 4"):
        pixel_score(lambda x, rows: rows, torch.zeros(2, 3, 4, 4))(torch.zeros(2, 4, dtype=torch.bool))
