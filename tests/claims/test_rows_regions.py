"""The bars of the claims about regions, from made-up arms: a perfect method holds every row, one without effect fails
the headline."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from claims import blend, inpaint, paint_with_words, shape_guided
from claims.blend import Outcome
from claims.paint_with_words import Found
from sfumato.metrics import stats
from sfumato.toybox.oracle import ObjectReading, SceneReading

N = 200


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setitem(stats.bootstrap.__kwdefaults__, "draws", 400)


def arm(seed, iou=0.6, background=30.0, seam=0.1, there=0.9):
    """Outcomes around these values."""
    dice = np.random.default_rng(seed)
    hit = dice.random(N) < there
    iou, background, seam = (dice.normal(value, abs(value) / 10, N) for value in (iou, background, seam))
    picture = SimpleNamespace()  # the rows never look at it
    return [
        Outcome(picture, bool(h), float(i) * h, float(b), float(s))
        for h, i, b, s in zip(hit, iou, background, seam, strict=True)
    ]


TRUTH = arm(0, 0.9, 38.0, 0.02, 1.0)


def test_blend():
    theirs = arm(1, 0.6, 29.0)
    good = blend.edit_rows(
        "toy", {"blend": arm(2, 0.9, 38.0, there=1.0), "image to image": theirs, "truth": TRUTH}, 0.5, {}
    )
    assert [row.holds for row in good] == [True] and good[0].headline
    null = blend.edit_rows("toy", {"blend": arm(3, 0.6, 29.0), "image to image": theirs, "truth": TRUTH}, 0.5, {})
    assert [row.holds for row in null] == [False]
    missing = {"blend": arm(4, 0.9, 38.0, there=0.6), "image to image": theirs, "truth": TRUTH}
    assert blend.edit_rows("toy", missing, 0.5, {})[0].holds is False  # keeps the background, and draws nothing
    blind = {"blend": arm(2, 0.9, 38.0), "image to image": theirs, "truth": arm(5, there=0.5)}
    assert "the judge" in blend.edit_rows("toy", blind, 0.5, {})[0].void


def test_resampling():
    plain = arm(1, seam=0.1)
    [row] = blend.resampled_rows("toy", {"blend": plain, "resampled": TRUTH, "truth": TRUTH}, {})
    assert row.holds
    [row] = blend.resampled_rows("toy", {"blend": plain, "resampled": arm(2, seam=0.1), "truth": TRUTH}, {})
    assert row.holds is False


def test_shape_guided_on_pictures():
    others = {
        "cross only": arm(1, 0.55),
        "no copy": arm(2, 0.9, 38.0),
        "blend": arm(3, 0.6),
        "image to image": arm(4, 0.5, 29.0),
        "truth": TRUTH,
    }
    shown = {"data": {}}
    good = shape_guided.picture_rows("toy", {"shape-guided": arm(5, 0.9, 38.0, there=1.0), **others}, 0.5, shown)
    assert [row.holds for row in good] == [True] * 3 and good[0].headline
    others["no copy"] = arm(6, 0.6, 29.0)
    null = shape_guided.picture_rows("toy", {"shape-guided": arm(7, 0.55), **others}, 0.5, shown)
    assert [row.holds for row in null] == [False] * 3


def test_shape_guided_from_noise():
    others = {"plain": arm(1, 0.25, there=0.95), "text only": arm(2, 0.25), "truth": TRUTH}
    shown = {"data": {}}
    [good] = shape_guided.noise_rows("toy", {"shape-guided": arm(3, 0.8, there=1.0), **others}, shown)
    [null] = shape_guided.noise_rows("toy", {"shape-guided": arm(4, 0.25, there=0.95), **others}, shown)
    assert good.holds and null.holds is False


def placed(seed, iou, inside, there=1.0):
    """Two phrases of each of ``N`` layouts."""
    dice = np.random.default_rng(seed)

    def one():
        hit = bool(dice.random() < there)
        return Found(hit, hit * float(np.clip(dice.normal(iou, 0.1), 0, 1)), hit and bool(dice.random() < inside))

    return [[one(), one()] for _ in range(N)]


def test_paint_with_words():
    plain, right = placed(1, 0.2, 0.25, 0.9), placed(2, 0.9, 1.0)
    good = paint_with_words.rows_of(
        "toy", {"plain": plain, "painted": right, "swapped": placed(3, 0.9, 1.0)}, placed(4, 0.1, 0.0), 0.4, {}
    )
    assert [row.holds for row in good] == [True, True] and good[0].headline
    same = {"plain": plain, "painted": placed(5, 0.2, 0.25, 0.9), "swapped": placed(6, 0.2, 0.25, 0.9)}
    null = paint_with_words.rows_of("toy", same, placed(7, 0.2, 0.25, 0.9), 0.4, {})
    assert [row.holds for row in null] == [False, False]
    erased = paint_with_words.rows_of(
        "toy", {"plain": plain, "painted": placed(8, 0.9, 1.0, 0.7), "swapped": right}, right, 0.4, {}
    )
    assert erased[0].holds is False  # in place, but often not drawn


def test_paint_with_words_ablations():
    steady = placed(9, 0.5, 0.5)
    rising = {0.0: placed(1, 0.2, 0.2), 0.1: placed(2, 0.4, 0.4), 0.2: placed(3, 0.6, 0.6), 0.4: placed(4, 0.9, 1.0)}
    rows = paint_with_words.ablation_rows("toy", rising, steady, 0.4)
    assert rows[0].holds and rows[0].bars[0].figure.value > 0.8 and rows[1].holds is None
    flat = {strength: placed(10 + i, 0.5, 0.5) for i, strength in enumerate(rising)}
    assert paint_with_words.ablation_rows("toy", flat, steady, 0.4)[0].holds is False
    still = {strength: flat[0.0] for strength in rising}
    assert paint_with_words.ablation_rows("toy", still, steady, 0.4)[0].holds is False


def filled(seed, inside=30.0, seam=0.1, there=0.9, empty=0.9, kept=True):
    """Outcomes of holes around these values."""
    dice = np.random.default_rng(seed)
    return [
        inpaint.Outcome(
            SimpleNamespace(),
            dice.normal(inside, 3),
            dice.normal(seam, seam / 10),
            kept,
            bool(a < there),
            bool(b < empty),
        )
        for a, b in dice.random((N, 2))
    ]


BEST = {"inpainting": inpaint.Setting(4.0, "hole"), "blending": inpaint.Setting(2.0, "hole")}


def test_inpaint():
    others = {"blending": filled(1, 29.0, 0.1, 0.6, 0.6), "truth": filled(2, 38.0, 0.02, 1.0, 1.0)}
    good = {"inpainting": filled(3, 37.0, 0.03, 0.97, 0.98), **others}
    rows = [*inpaint.remove_rows(good, BEST), *inpaint.replace_rows(good, BEST), *inpaint.background_rows(good, BEST)]
    assert [row.holds for row in rows] == [True] * 5 and [row.headline for row in rows] == [True] + [False] * 4
    same = {"inpainting": filled(4, 29.0, 0.1, 0.02, 0.5), **others}
    rows = [*inpaint.remove_rows(same, BEST), *inpaint.replace_rows(same, BEST), *inpaint.background_rows(same, BEST)]
    assert [row.holds for row in rows] == [False] * 5
    spilt = {"inpainting": filled(5, 37.0, kept=False), **others}
    assert inpaint.remove_rows(spilt, BEST)[0].holds is False


def test_holes_in_which_nothing_shall_come():
    for case in inpaint.backgrounds("test", 7, 2, 64):
        assert torch.equal(case.picture, case.truth) and case.request is None and 0 < case.hole.float().mean() < 0.6
    case = inpaint.backgrounds("test", 7, 1, 64)[0]
    box = (0.0, 0.0, 1.0, 1.0)
    within, beside = (
        SceneReading((ObjectReading("ball", "red", "plain", "large", mask, box, 0.9),), "grass", "day")
        for mask in (case.hole, ~case.hole)
    )
    assert not inpaint.measured(case, case.truth, within).empty and inpaint.measured(case, case.truth, beside).empty


@pytest.mark.parametrize("side", [64, 128])
def test_cases_of_any_size(side):
    removed, replaced = (make("test", 7, 1, side)[0] for make in (inpaint.removals, inpaint.replacements))
    for case in (removed, replaced):
        assert case.picture.shape == (3, side, side) and case.hole.shape == (side, side)
        changed = (case.picture - case.truth).abs().amax(0) > 0.03
        assert changed.any() and not (changed & ~case.hole).any()
    assert replaced.request is not None and removed.request is None
