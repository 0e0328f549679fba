"""How well two sets cover each other: improved precision and recall, density and coverage, on features.

Kynkaanniemi et al. 2019 (https://arxiv.org/abs/1904.06991), section 2: a set's manifold is the union of balls around
its features, each reaching to the k-th nearest neighbour (k = 3). Naeem et al. 2020 (https://arxiv.org/abs/2002.09797),
section 3: density counts how many real balls hold a fake, coverage how many real balls hold any fake (k = 5).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sfumato.errors import BadInput
from sfumato.metrics import stats
from sfumato.metrics.frechet import finite
from sfumato.metrics.kernel import blocks, pair


@dataclass(frozen=True)
class Manifold:
    """Shares and a mean, with intervals over the pictures counted (the balls are taken as given).

    Attributes:
        precision: share of the fakes inside the real manifold.
        recall: share of the reals inside the fake manifold.
        density: real balls a fake lies in, divided by k; mean over fakes, may exceed 1.
        coverage: share of the reals whose ball holds a fake.
    """

    precision: stats.Interval
    recall: stats.Interval
    density: stats.Interval
    coverage: stats.Interval

    def to_json(self) -> dict[str, object]:
        """Every figure as plain numbers."""
        return {name: getattr(self, name).to_json() for name in ("precision", "recall", "density", "coverage")}


def manifold(real: np.ndarray, fake: np.ndarray, k: int = 3, k_density: int = 5) -> Manifold:
    """Precision and recall with ``k`` neighbours, density and coverage with ``k_density``; features (m, d), (n, d).

    Raises BadInput when a side has not more pictures than neighbours are asked for.
    """
    if k < 1 or k_density < 1:
        raise BadInput(f"k={k} and k_density={k_density} must be at least 1.")
    most = max(k, k_density)
    x, y = pair(real, fake, most + 1), finite(fake)
    near_x, near_y = _radii(x, most), _radii(y, k)
    ball, wide, fake_ball = near_x[:, k - 1], near_x[:, k_density - 1], near_y[:, k - 1]
    inside: np.ndarray = np.zeros(len(y), dtype=bool)
    recalled: np.ndarray = np.zeros(len(x), dtype=bool)
    covered: np.ndarray = np.zeros(len(x), dtype=bool)
    density = np.zeros(len(y))
    for rows in blocks(len(x)):
        for columns in blocks(len(y)):
            d = squared_distances(x[rows], y[columns])
            inside[columns] |= (d <= ball[rows, None]).any(0)
            recalled[rows] |= (d <= fake_ball[None, columns]).any(1)
            wide_hits = d <= wide[rows, None]
            covered[rows] |= wide_hits.any(1)
            density[columns] += wide_hits.sum(0) / k_density
    return Manifold(stats.share(inside), stats.share(recalled), stats.mean(density), stats.share(covered))


def squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """|x_i - y_j|^2 of features (m, d) and (n, d) in float64; equal rows are exactly 0 apart."""
    lengths = np.einsum("nd,nd->n", x, x)[:, None] + np.einsum("nd,nd->n", y, y)[None]
    d = lengths - 2 * (x @ y.T)
    close = d < 1e-9 * lengths  # the difference cancels for near neighbours: those are computed again, directly
    for row in np.flatnonzero(close.any(1)):
        d[row, close[row]] = np.square(x[row] - y[close[row]]).sum(-1)
    return d


def _radii(x: np.ndarray, k: int) -> np.ndarray:
    """Squared distances of each row to its 1st ... k-th nearest other row (n, k)."""
    out = np.empty((len(x), k))
    for rows in blocks(len(x)):
        nearest = np.full((rows.stop - rows.start, 0), np.inf)
        for columns in blocks(len(x)):
            d = squared_distances(x[rows], x[columns])
            if rows == columns:
                np.fill_diagonal(d, np.inf)
            merged = np.concatenate([nearest, d], 1)
            nearest = np.partition(merged, min(k, merged.shape[1]) - 1, axis=1)[:, :k]
        out[rows] = np.sort(nearest, 1)
    return out
