"""Bars: one rule, power, and what can decide nothing."""

from __future__ import annotations

import numpy as np
import pytest

from claims.bars import Bar
from claims.core import Row
from sfumato.errors import BadInput
from sfumato.metrics import stats
from sfumato.metrics.stats import Interval

LIFT = Interval(0.14, 0.03, 0.25, 80)


def test_a_size_is_asked_of_the_estimate_and_a_direction_of_the_interval():
    assert Bar(LIFT, 0, 1, at_least=0.12, above=0).met()
    assert not Bar(LIFT, 0, 1, at_least=0.15).met() and not Bar(LIFT, 0, 1, above=0.05).met()
    assert Bar(Interval(-0.1, -0.2, -0.02, 9), 0, -1, at_most=-0.1, below=0).met()
    assert not Bar(Interval(-0.1, -0.2, 0.02, 9), 0, -1, below=0).met()
    with pytest.raises(BadInput, match="asks for nothing"):
        Bar(LIFT, 0, 1)


def test_a_bar_that_cannot_fail_or_cannot_pass_decides_nothing():
    assert Bar(LIFT, 0, 1, at_least=0.12).fault == ""
    assert "without the effect would pass" in Bar(LIFT, 0, 1, at_least=-0.1).fault
    # accuracy 0.914 leaves no room for 0.10 more
    assert "perfect method would fail" in Bar(LIFT, 0, 0.086, at_least=0.10).fault
    assert "perfect method would fail" in Bar(Interval(0.2, -0.6, 1.0, 4), 0, 0.5, above=0).fault


def test_what_is_refuted_is_not_void_for_being_wide():
    harm = Interval(-0.3, -0.4, -0.2, 80)
    assert Bar(harm, -0.05, 0, above=-0.05).fault == "" and not Bar(harm, -0.05, 0, above=-0.05).met()
    assert "perfect method" in Bar(Interval(-0.1, -0.2, 0.0, 80), -0.05, 0, above=-0.05).fault  # as wide, undecided
    assert "perfect method" in Bar(Interval(0.01, 0.0, 0.02, 80), 0, 0.05, at_least=0.1).fault  # no room at any n


def row(**given):
    return Row(claim="c", source="s", measured="m", baseline="b", n=80, **given)


def test_rows_take_their_verdict_from_their_bars():
    good, bad = Bar(LIFT, 0, 1, above=0), Bar(LIFT, 0, 1, at_least=0.2)
    assert row(bars=[good]).holds is True and row(bars=[good, bad]).holds is False
    void = row(bars=[good, Bar(LIFT, 0, 1, at_least=-0.1)])
    assert void.holds is None and "decides nothing" in void.void
    assert row(bars=[good], void="plain sampling is too good").holds is None
    assert row().holds is None and row(holds=True).holds is True
    plain = row(bars=[good]).to_json()
    assert plain["bars"][0]["met"] and plain["bars"][0]["figure"]["value"] == 0.14


def test_the_smallest_effect_is_found_in_four_of_five_repetitions():
    n, rng = 100, np.random.default_rng(0)
    width = stats.mean(rng.normal(0, 1, n))
    bar = Bar(width, 0, 5, above=0)
    found = [Bar(stats.mean(rng.normal(bar.smallest, 1, n)), 0, 5, above=0).met() for _ in range(400)]
    assert 0.74 < np.mean(found) < 0.86
    sized = Bar(width, 0, 5, at_least=0.5)
    found = [Bar(stats.mean(rng.normal(sized.smallest, 1, n)), 0, 5, at_least=0.5).met() for _ in range(400)]
    assert 0.74 < np.mean(found) < 0.86
    assert Bar(width, 0, -5, below=0).smallest == pytest.approx(-bar.smallest)
    assert "would find" in bar.text() and "n 100" in bar.text()
