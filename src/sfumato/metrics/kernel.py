"""Kernel distance: the squared maximum mean discrepancy with KID's cubic polynomial kernel, unbiased, in blocks.

Binkowski et al. 2018 (https://arxiv.org/abs/1801.01401), section 4: k(x, y) = (x . y / d + 1)^3. Unlike the Frechet
distance its expectation does not depend on the number of pictures; it may come out slightly negative.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from sfumato.errors import BadInput
from sfumato.metrics.frechet import finite
from sfumato.metrics.stats import Interval

BLOCK = 1024


@dataclass(frozen=True)
class Kernel:
    """(gamma x . y + offset)^degree; ``gamma`` None is 1 / d, as in KID."""

    degree: int = 3
    gamma: float | None = None
    offset: float = 1.0

    def __call__(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        gamma = 1.0 / x.shape[1] if self.gamma is None else self.gamma
        return (gamma * (x @ y.T) + self.offset) ** self.degree


def kernel_distance(
    first: np.ndarray, second: np.ndarray, kernel: Kernel | None = None, level: float = 0.95
) -> Interval:
    """Unbiased squared MMD of all pairs of features (m, d) and (n, d), with its interval.

    Computed block against block: memory grows with the block, not with m n. The interval is normal, with the variance
    of the estimator's Hajek projection, 4 (var a / m + var b / n), where a_i = mean k(x_i, x') - mean k(x_i, y) and b
    likewise (Sutherland et al. 2017, https://arxiv.org/abs/1611.04488, section 3, without the second-order term).
    """
    x, y, k = pair(first, second, 2), finite(second), kernel or Kernel()
    m, n = len(x), len(y)
    own_x, own_y, across_x, across_y = np.zeros(m), np.zeros(n), np.zeros(m), np.zeros(n)
    for rows in blocks(m):
        own_x[rows] = sum(k(x[rows], x[others]).sum(1) for others in blocks(m)) - _diagonal(k, x[rows])
        for columns in blocks(n):
            tile = k(x[rows], y[columns])
            across_x[rows] += tile.sum(1)
            across_y[columns] += tile.sum(0)
    for rows in blocks(n):
        own_y[rows] = sum(k(y[rows], y[others]).sum(1) for others in blocks(n)) - _diagonal(k, y[rows])
    value = own_x.sum() / (m * (m - 1)) + own_y.sum() / (n * (n - 1)) - 2 * across_x.sum() / (m * n)
    a, b = own_x / (m - 1) - across_x / n, own_y / (n - 1) - across_y / m
    half = NormalDist().inv_cdf(0.5 + level / 2) * math.sqrt(4 * (a.var(ddof=1) / m + b.var(ddof=1) / n))
    return Interval(float(value), float(value - half), float(value + half), min(m, n), level)


def pair(first: np.ndarray, second: np.ndarray, least: int) -> np.ndarray:
    """``first`` in float64, after checking that both sides fit together and have ``least`` pictures."""
    x, y = finite(first), np.asarray(second)
    if x.shape[1] != y.shape[-1]:
        raise BadInput(f"features of {x.shape[1]} and {y.shape[-1]} numbers cannot be compared.")
    if min(len(x), len(y)) < least:
        raise BadInput(f"at least {least} pictures are needed on each side; got {len(x)} and {len(y)}.")
    return x


def blocks(n: int) -> Iterator[slice]:
    """Rows 0 to n in slices of at most ``BLOCK``."""
    return (slice(start, min(start + BLOCK, n)) for start in range(0, n, BLOCK))


def _diagonal(kernel: Kernel, x: np.ndarray) -> np.ndarray:
    gamma = 1.0 / x.shape[1] if kernel.gamma is None else kernel.gamma
    return (gamma * np.einsum("nd,nd->n", x, x) + kernel.offset) ** kernel.degree
