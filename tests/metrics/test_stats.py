"""Intervals and tests against published examples, theory and exhaustive enumeration."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from sfumato.errors import BadInput
from sfumato.metrics import stats


def test_wilson_published_examples():
    # Newcombe 1998 (Statist. Med. 17, 857-872), table I, method 3
    for successes, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        got = stats.wilson(successes, n)
        assert got.low == pytest.approx(low, abs=1e-4) and got.high == pytest.approx(high, abs=1e-4)
    assert stats.wilson(29, 29).high == 1.0 and stats.share([True] * 29).value == 1.0


def test_newcombe_published_example():
    # Newcombe 1998 (Statist. Med. 17, 873-890), table II, method 10: 56/70 - 48/80
    got = stats.newcombe(stats.wilson(56, 70), stats.wilson(48, 80))
    assert (got.value, got.low, got.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)


@pytest.mark.parametrize("successes, n", [(1, 0), (5, 4), (-1, 3)])
def test_wilson_refuses(successes, n):
    with pytest.raises(BadInput, match="wilson"):
        stats.wilson(successes, n)


def test_bootstrap_agrees_with_theory():
    rng = np.random.default_rng(0)
    sample = rng.normal(2.0, 3.0, 400)
    got = stats.bootstrap(sample)
    half = 1.96 * sample.std(ddof=1) / math.sqrt(400)
    assert got.value == pytest.approx(sample.mean())
    assert got.low == pytest.approx(sample.mean() - half, abs=0.05)
    assert got.high == pytest.approx(sample.mean() + half, abs=0.05)
    assert stats.bootstrap(sample) == got  # seeded


def test_paired_bootstrap_uses_the_pairing():
    rng = np.random.default_rng(1)
    base = rng.normal(0, 10, 100)
    better = base + 0.5 + rng.normal(0, 0.5, 100)
    paired, loose = stats.paired_difference(better, base), stats.difference(better, base)
    assert paired.excludes(0) and not loose.excludes(0)
    assert paired.value == pytest.approx(loose.value)
    assert paired.p <= 0.001 < loose.p


def test_bootstrap_covers_as_often_as_it_says():
    rng = np.random.default_rng(2)
    covered = [not stats.bootstrap(rng.exponential(1.0, 60), draws=400, seed=i).excludes(1.0) for i in range(200)]
    assert 0.88 <= np.mean(covered) <= 0.99


def test_ratio():
    got = stats.ratio([2.0, 4.0] * 20, [1.0, 2.0] * 20)
    assert got.value == pytest.approx(2.0) and got.low < 2.0 < got.high and got.p is None


def test_permutation_against_enumeration():
    one, two = [1.2, 3.4, 2.2, 5.0], [0.3, 1.1, 2.0, 0.7, 1.9]
    pooled = np.array(one + two)
    observed = abs(np.mean(one) - np.mean(two))
    differences = []
    for chosen in itertools.combinations(range(9), 4):
        mask = np.zeros(9, bool)
        mask[list(chosen)] = True
        differences.append(abs(pooled[mask].mean() - pooled[~mask].mean()))
    exact = np.mean(np.array(differences) >= observed - 1e-12)
    assert stats.permutation(one, two) == pytest.approx(exact, abs=0.01)


def test_paired_permutation_against_enumeration():
    gaps = np.array([0.4, -0.1, 0.8, 0.3, 0.6, -0.2, 0.5])
    signs = np.array(list(itertools.product((-1, 1), repeat=7)))
    exact = np.mean(np.abs((signs * gaps).mean(1)) >= abs(gaps.mean()) - 1e-12)
    assert stats.permutation(gaps, np.zeros(7), paired=True) == pytest.approx(exact, abs=0.01)


def test_bad_samples():
    with pytest.raises(BadInput):
        stats.bootstrap([])
    with pytest.raises(BadInput, match="length"):
        stats.paired_difference([1.0], [1.0, 2.0])
    with pytest.raises(BadInput):
        stats.permutation([], [1.0])


def test_text():
    assert stats.wilson(1, 2).text(percent=True) == "50.0 % [9.5, 90.5]"
    assert stats.spread([3.0, 1.0, 2.0]) == (2.0, 1.5, 2.5)


def test_mcnemar_by_enumeration():
    # of 8 pairs that disagree 1 goes the other way: 2 (1 + 8) / 2^8
    first, second = [True] * 7 + [False] + [True] * 20, [False] * 7 + [True] + [True] * 20
    assert stats.mcnemar(first, second).p == stats.mcnemar(second, first).p == pytest.approx(18 / 256)
    assert stats.mcnemar([True, False], [True, False]).p == 1.0
    ways = [sum(signs) for signs in itertools.product((0, 1), repeat=5)]  # 0 of 5: as extreme are 0 and 5
    assert stats.mcnemar([True] * 5, [False] * 5).p == sum(k in (0, 5) for k in ways) / len(ways)


def test_mcnemar():
    from scipy.stats import binomtest

    one = [True] * 14 + [True] * 5 + [False] * 22 + [False] * 2
    two = [True] * 14 + [False] * 5 + [True] * 22 + [False] * 2
    got = stats.mcnemar(one, two)
    assert got.value == pytest.approx((5 - 22) / 43) and got.n == 43
    assert got.p == pytest.approx(binomtest(5, 27).pvalue)
    assert got.low < got.value < got.high < 0
    back = stats.mcnemar(two, one)
    assert (back.low, back.high, back.p) == (pytest.approx(-got.high), pytest.approx(-got.low), got.p)
    same = stats.mcnemar(one, one)
    assert (same.value, same.p) == (0, 1) and same.low <= 0 <= same.high
    with pytest.raises(BadInput, match="mcnemar"):
        stats.mcnemar([True], [True, False])


def test_mcnemar_covers():
    rng = np.random.default_rng(0)
    held = []
    for _ in range(400):
        skill = rng.random(40)  # hard and easy items: the two columns agree more than chance
        one, two = rng.random(40) < 0.3 + 0.6 * skill, rng.random(40) < 0.1 + 0.6 * skill
        got = stats.mcnemar(one, two)
        held.append(got.low <= 0.2 <= got.high)
    assert 0.92 <= np.mean(held) <= 0.99


def test_t_intervals_against_scipy():
    from scipy import stats as reference

    x, y = np.random.default_rng(1).normal(size=12), np.random.default_rng(2).normal(1, 3, size=20)
    low, high = reference.t.interval(0.95, 11, x.mean(), reference.sem(x))
    got = stats.mean(x)
    assert (got.low, got.high) == (pytest.approx(low), pytest.approx(high))
    theirs = reference.ttest_ind(x, y, equal_var=False).confidence_interval(0.95)
    ours = stats.welch(x, y)
    assert (ours.low, ours.high) == (pytest.approx(theirs.low), pytest.approx(theirs.high))
    alone = stats.mean([3.0])
    assert alone.value == 3 and alone.to_json()["low"] is None
    with pytest.raises(BadInput, match="welch"):
        stats.welch([1.0], [1.0, 2.0])
