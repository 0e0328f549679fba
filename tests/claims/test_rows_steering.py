"""The bars of the steering claims, from made-up arms: a perfect method holds every row, one without effect none of
those that promise something."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from claims import attend_excite, common, structured_guidance
from claims.attend_excite import Arm
from sfumato.metrics import stats
from sfumato.toybox import oracle

N = 240

HALF = (np.random.default_rng(0).random(N) < 0.6).tolist()  # plain sampling is right in three of five
OTHER = (np.random.default_rng(1).random(N) < 0.6).tolist()


def arm(right, cost=50.0, leaked=None):
    """An arm whose picture i shows everything where ``right[i]``; else one toy wears another's colour."""
    checks = [
        oracle.Check((True, hit), (True, hit), (False, not hit if leaked is None else leaked[i]), hit)
        for i, hit in enumerate(right)
    ]
    return Arm(torch.zeros(len(right), 3, 4, 4), checks, cost)


def leaking(right):
    """As :func:`arm`, every shape there and colours wrong instead."""
    return Arm(
        torch.zeros(len(right), 3, 4, 4),
        [oracle.Check((True, True), (True, hit), (False, not hit), True) for hit in right],
        50.0,
    )


def headline(rows):
    [row] = [row for row in rows if row.headline]
    return row


def promised(rows):
    """Rows with bars: all but those that are only reported."""
    return [row for row in rows if row.bars]


PERFECT = [True] * N


def test_attend_excite():
    arms = {"plain": arm(HALF), "once": arm(PERFECT), "random": arm(OTHER), "best": arm(OTHER), "ours": arm(PERFECT)}
    rows = attend_excite.rows_of("toy", arms, 2, {})
    assert all(row.holds for row in promised(rows)) and len(promised(rows)) == 4 and not any(row.void for row in rows)
    assert headline(rows) is rows[0]
    null = attend_excite.rows_of("toy", {**arms, "ours": arm(OTHER), "once": arm(HALF)}, 2, {})
    assert [row.holds for row in promised(null)] == [False] * 4
    easy = attend_excite.rows_of("toy", {**arms, "plain": arm(PERFECT)}, 2, {})
    assert "succeeds in 100 %" in headline(easy).void and headline(easy).holds is None


def test_attend_excite_on_one_toy_and_harder_prompts():
    assert attend_excite.one_row("toy", arm(PERFECT), arm(PERFECT), {}).holds
    worse = [i % 12 > 0 for i in range(N)]
    assert attend_excite.one_row("toy", arm(PERFECT), arm(worse), {}).holds is False
    assert attend_excite.one_row("toy", arm(PERFECT[:12]), arm(PERFECT[:12]), {}).holds is not True  # too few
    assert attend_excite.harder_row("toy", "patterns", arm(HALF), arm(PERFECT), {}).holds
    assert attend_excite.harder_row("toy", "patterns", arm(HALF), arm(OTHER), {}).holds is False


def test_structured_guidance():
    kind = structured_guidance.HEADLINE
    arms = {label: leaking(OTHER) for label in ("random", "turned", "conjunction")}
    rows = structured_guidance.rows_of("toy", kind, {"plain": leaking(HALF), "ours": leaking(PERFECT), **arms}, {})
    assert all(row.holds for row in promised(rows)) and len(promised(rows)) == 4 and headline(rows) is rows[0]
    null = structured_guidance.rows_of("toy", kind, {"plain": leaking(HALF), "ours": leaking(OTHER), **arms}, {})
    assert headline(null).holds is False
    # without effect nothing is harmed, which is the one row that such a method may hold
    assert [row.holds for row in promised(null)] == [False, False, True, False]
    quiet = structured_guidance.rows_of("toy", kind, {"plain": arm(HALF), "ours": arm(PERFECT)}, {})
    assert quiet[1].void and quiet[1].holds is None and quiet[0].holds
    harmed = structured_guidance.rows_of("toy", kind, {"plain": arm(HALF), "ours": arm([False] * N)}, {})
    assert harmed[2].holds is False


def test_structured_guidance_needs_something_to_repair():
    dice = np.random.default_rng(2)
    first, second = dice.normal(0.02, 0.01, 60), dice.normal(0.5, 0.1, 60)
    assert structured_guidance.contamination_rows("toy", first, second)[0].holds
    assert structured_guidance.contamination_rows("toy", first, first)[0].holds is False


def test_leaks_are_counted_where_the_shape_is_there():
    missing = oracle.Check((True, False), (True, False), (False, True), False)
    wearing = oracle.Check((True, True), (True, False), (False, True), True)
    assert structured_guidance.leaks(Arm(torch.zeros(2, 3, 4, 4), [missing, wearing], 1.0)) == [False, True]


@pytest.mark.parametrize("kind", common.KINDS)
def test_prompts_of_each_kind(kind):
    asked = common.steering(kind, 5, 40)
    assert len({prompt.text for prompt in asked}) == 40
    assert [p.text for p in asked[:7]] == [p.text for p in common.steering(kind, 5, 7)]
    for prompt in asked:
        shapes, colors = [w.shape for w in prompt.wishes], [w.color for w in prompt.wishes]
        assert len(set(colors)) == len(colors) == (2 if kind == "patterns" else 3)
        assert len(set(shapes)) == 2 if kind != "three toys" else len(set(shapes)) == 3
        assert all((w.pattern is not None) == (kind == "patterns") for w in prompt.wishes)


def test_void_and_harm():
    assert common.void(stats.share(HALF)) == "" and common.void(stats.share([True] * 9)) != ""
    assert common.no_harm(stats.mcnemar(PERFECT, PERFECT), "x").met()
    assert not common.no_harm(stats.mcnemar([i % 12 > 0 for i in range(N)], PERFECT), "x").met()
    wishes = (oracle.Wanted("ball", "red"), oracle.Wanted("cone", "blue", "striped"))
    check = oracle.Check((True, False), (False, False), (True, False), False)
    assert common.failing(check, wishes) == "not red ball, no cone"
    assert common.asked_for(wishes) == "red ball, blue striped cone"
