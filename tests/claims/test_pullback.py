"""The pieces of the claims on latent geometry."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from claims import pullback


def test_the_correlation_of_pairs_is_drawn_over_the_things_they_share():
    pairs = list(combinations(range(12), 2))
    place = np.random.default_rng(0).random(12)
    apart = [float(abs(place[a] - place[b])) for a, b in pairs]
    found = pullback.correlation(pairs, [-each for each in apart], apart, 12)
    assert (found.value, found.low, found.high) == pytest.approx((-1.0, -1.0, -1.0)) and found.n == 12
    noise = np.random.default_rng(1).random(len(pairs)).tolist()
    found = pullback.correlation(pairs, noise, apart, 12)
    assert found.low < 0 < found.high and found.low < found.value < found.high
