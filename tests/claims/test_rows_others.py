"""The bars of InjectFusion's and of SaD and PaD's claims, from made-up figures."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from claims import common, inject_fusion, sad_pad
from claims.inject_fusion import STRENGTHS, Outcome
from sfumato.metrics import stats
from sfumato.metrics.stats import Interval

N = 120
BEST = {
    "bottleneck": {"strength": 0.7},
    "layer": {"layer": "up.0", "strength": 0.7},
    "noise": {"ratio": 0.5},
    "skips": {"ratio": 0.5},
}


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setitem(stats.bootstrap.__kwdefaults__, "draws", 400)


def fused(shape, look, seed):
    """Outcomes of pairs that have the content's shape and each part of the look so often."""
    dice = np.random.default_rng(seed).random((N, 4))
    return [
        Outcome(SimpleNamespace(), bool(row[0] < shape), tuple(bool(each < look) for each in row[1:])) for row in dice
    ]


def arms(bottleneck, layer, calibrated):
    """All arms; ``layer`` and ``calibrated``: (shape, look) by strength."""
    found = {label: fused(0.05, 0.9, i) for i, label in enumerate(("none", "noise", "skips", "lerp", "symmetric"))}
    found["bottleneck"] = fused(*bottleneck, 10)
    for i, share in enumerate(STRENGTHS):
        found[f"layer {share:g}"] = fused(*layer[i], 20 + i)
        found[f"calibrated {share:g}"] = fused(*calibrated[i], 30 + i)
    return found


def test_inject_fusion():
    rising = [(0.3, 0.8), (0.6, 0.7), (0.9, 0.6), (0.95, 0.5)]
    gentle = [(0.3, 0.95), (0.6, 0.95), (0.9, 0.95), (0.95, 0.95)]
    rows = inject_fusion.rows_of("toy", arms((0.95, 0.95), rising, gentle), BEST, 0.4, {})
    assert [row.holds for row in rows] == [True] * 5 and [row.headline for row in rows] == [True] + [False] * 4
    same = [(0.05, 0.9)] * 4
    null = inject_fusion.rows_of("toy", arms((0.05, 0.9), same, same), BEST, 0.4, {})
    assert [row.holds for row in null] == [False, False, False, False, None] and "at equal content" in null[4].void
    dead = inject_fusion.rows_of("toy", arms((0.95, 0.95), rising, gentle), BEST, 1e-4, {})
    assert "nothing to inject into" in dead[0].void and dead[0].holds is None


def test_calibration_that_gives_the_content_away_wins_nothing():
    """It keeps more of the look because it brings less of the content: the strengths are matched by content."""
    rising = [(0.3, 0.9), (0.6, 0.8), (0.9, 0.6), (0.95, 0.5)]
    slower = [(0.05, 0.95), (0.3, 0.9), (0.6, 0.8), (0.9, 0.6)]
    assert inject_fusion.rows_of("toy", arms((0.5, 0.5), rising, slower), BEST, 0.4, {})[4].holds is False
    nothing = [(0.05, 0.99)] * 4
    row = inject_fusion.rows_of("toy", arms((0.5, 0.5), rising, nothing), BEST, 0.4, {})[4]
    assert row.holds is None and row.void


def test_influence_of_the_bottleneck():
    layers = {"up.0": Interval(0.5, 0.4, 0.6, 40)}
    assert inject_fusion.influence_rows("toy", {"mid": Interval(0.3, 0.2, 0.4, 40), **layers})[0].holds
    assert inject_fusion.influence_rows("toy", {"mid": Interval(0.01, 0.0, 0.02, 40), **layers})[0].holds is False


def test_agreement_of_ranks():
    rising = np.arange(4)[:, None] + np.zeros((1, 9))
    assert common.agreement(rising).value == pytest.approx(1) and common.agreement(-rising).value == pytest.approx(-1)
    assert common.agreement(np.zeros((4, 9))).value == 0


@dataclass
class Found:
    """What :class:`sfumato.metrics.sad_pad.Divergences` tells."""

    sad: float
    attributes: list[Any] = field(default_factory=list)
    pairs: list[Any] = field(default_factory=list)
    sad_null: float = 1.0
    pad: float = 5.0
    pad_null: float = 1.0

    def to_json(self):
        return {}


def attribute(name):
    return SimpleNamespace(name=name, shifted=True, gap=Interval(0.3, 0.2, 0.4, 9))


def test_reading_by_hcs():
    dice = np.random.default_rng(0)
    theirs = dice.binomial(6, 0.9, 300) / 6
    assert sad_pad.reading_rows(np.ones(300), theirs, [(0.99, 0.9)] * 5 + [(0.8, 0.9)])[0].holds
    other = dice.binomial(6, 0.9, 300) / 6
    assert sad_pad.reading_rows(other, theirs, [(0.9, 0.9)] * 3 + [(0.8, 0.9)] * 3)[0].holds is False


def test_imbalance_is_found():
    good = [[Found(level, [attribute("red")]) for level in (0.6, 5.0, 12.0, 40.0)] for _ in range(3)]
    assert sad_pad.imbalance_rows(good)[0].holds and sad_pad.imbalance_rows(good)[0].headline
    blind = [[Found(0.6, [attribute("cube")]) for _ in range(4)] for _ in range(3)]
    for found in blind:
        for i, one in enumerate(found):
            one.sad = (0.6, 0.5, 0.7, 0.55)[i]
    assert sad_pad.imbalance_rows(blind)[0].holds is False
    loud = [[Found(30 + level, [attribute("red")]) for level in (0.6, 5.0, 12.0, 40.0)] for _ in range(3)]
    assert sad_pad.imbalance_rows(loud)[0].holds is False  # equal sets are called unequal


def test_pairs_are_found():
    def found(first, second, excess, sad=0.6):
        pair = SimpleNamespace(first=first, second=second, shifted=True, excess=excess, null=1.0)
        return Found(sad, pairs=[pair])

    far = (0.1, Interval(0.1, 0.0, 0.2, 9))
    assert sad_pad.pair_rows([found("red", "cube", 20.0)] * 3, far, far)[0].holds
    assert sad_pad.pair_rows([found("blue", "cube", 1.0)] * 3, far, far)[0].holds is False
    assert sad_pad.pair_rows([found("red", "cube", 20.0, sad=3.0)] * 3, far, far)[0].holds is False


def test_exact_attributes():
    assert sad_pad.oracle_rows([0.95, 0.97, 0.96])[0].holds
    assert sad_pad.oracle_rows([0.1, -0.2, 0.05])[0].holds is False


def test_pools_share_no_toy():
    sets = [set(sad_pad.drawn(60, 2, pool=pool)[0]) for pool in range(3)] + [set(sad_pad.drawn(60, sad_pad.REAL)[0])]
    assert all(not one & other for i, one in enumerate(sets) for other in sets[:i])
