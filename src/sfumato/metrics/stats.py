"""Intervals and tests that stand beside every measured number: Wilson, Newcombe, McNemar, t, bootstrap, permutation.

Everything takes plain sequences of numbers and is deterministic given ``seed``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from sfumato.errors import BadInput


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval.

    ``low``/``high`` bound it at confidence ``level``; ``n`` is the number of samples (of pairs, for paired
    estimates). ``p`` is the two-sided p-value of "no difference" where the method yields one.
    """

    value: float
    low: float
    high: float
    n: int
    level: float = 0.95
    p: float | None = None

    def excludes(self, value: float) -> bool:
        """Whether ``value`` lies outside the interval."""
        return not self.low <= value <= self.high

    def to_json(self) -> dict[str, float | int | None]:
        """Plain numbers, for a results file; a bound that does not exist is None."""
        low, high = (bound if math.isfinite(bound) else None for bound in (self.low, self.high))
        record = {"value": self.value, "low": low, "high": high, "n": self.n, "level": self.level}
        return record | ({} if self.p is None else {"p": self.p})

    def text(self, percent: bool = False, digits: int | None = None) -> str:
        """``0.512 [0.480, 0.544]``, or ``51.2 % [48.0, 54.4]`` with ``percent``."""
        scale, unit = (100.0, " %") if percent else (1.0, "")
        places = digits if digits is not None else (1 if percent else 3)
        value, low, high = (f"{scale * number:.{places}f}" for number in (self.value, self.low, self.high))
        return f"{value}{unit} [{low}, {high}]"


def wilson(successes: int, n: int, level: float = 0.95) -> Interval:
    """Wilson score interval of a proportion (Wilson 1927): honest near 0 and 1, never leaves [0, 1].

    Raises BadInput when ``n`` is 0 or ``successes`` is not in 0..n.
    """
    if n <= 0 or not 0 <= successes <= n:
        raise BadInput(f"wilson: successes={successes} of n={n} is no proportion; need n > 0 and 0 <= successes <= n.")
    from scipy.stats import binomtest

    _z(level)
    share = successes / n
    low, high = binomtest(int(successes), int(n)).proportion_ci(level, "wilson")
    # rounding must not put the estimate outside its own interval
    return Interval(share, min(share, float(low)), max(share, float(high)), n, level)


def share(hits: Sequence[bool] | np.ndarray, level: float = 0.95) -> Interval:
    """Wilson interval of the share of true values."""
    values = np.asarray(hits, dtype=bool)
    return wilson(int(values.sum()), int(values.size), level)


def newcombe(first: Interval, second: Interval) -> Interval:
    """Interval of ``first - second`` for two independent proportions (Newcombe 1998, method 10) from their Wilsons."""
    value = first.value - second.value
    low = value - math.hypot(first.value - first.low, second.high - second.value)
    high = value + math.hypot(first.high - first.value, second.value - second.low)
    return Interval(value, low, high, min(first.n, second.n), first.level)


def mcnemar(first: Sequence[bool] | np.ndarray, second: Sequence[bool] | np.ndarray, level: float = 0.95) -> Interval:
    """Difference ``first - second`` of two proportions measured on the same n items, with McNemar's exact p-value.

    The interval is Newcombe's for paired proportions (Newcombe 1998, Statistics in Medicine 17:2635, method 10); the
    p-value is the two-sided binomial test of the pairs that differ (McNemar 1947). Raises BadInput unless both have
    the same n > 0 entries.
    """
    one, two = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if one.ndim != 1 or one.shape != two.shape or not one.size:
        raise BadInput(f"mcnemar: got {one.size} and {two.size} values; both need the same number, above 0.")
    n = one.size
    both, only_one = int((one & two).sum()), int((one & ~two).sum())
    only_two, none = int((~one & two).sum()), int((~one & ~two).sum())
    a, b = share(one, level), share(two, level)
    # correlation of the pair, with Newcombe's continuity correction
    product = float(both * none - only_one * only_two)
    product = max(product - n / 2, 0.0) if product > 0 else product
    margins = (both + only_one) * (only_two + none) * (both + only_two) * (only_one + none)
    correlation = product / math.sqrt(margins) if margins else 0.0

    def joined(x: float, y: float) -> float:
        return math.sqrt(max(x * x - 2 * correlation * x * y + y * y, 0.0))

    value = a.value - b.value
    low = value - joined(a.value - a.low, b.high - b.value)
    high = value + joined(a.high - a.value, b.value - b.low)
    differ = only_one + only_two
    tail = sum(math.comb(differ, k) for k in range(min(only_one, only_two) + 1))
    p = min(1.0, 2 * tail / 2**differ) if differ else 1.0
    return Interval(value, low, high, n, level, p)


def mean(values: Sequence[float] | np.ndarray, level: float = 0.95) -> Interval:
    """Mean with Student's t interval."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size:
        raise BadInput("mean: needs a non-empty one-dimensional sequence of numbers.")
    return mean_of(array.size, float(array.mean()), float(array.var(ddof=1)) if array.size > 1 else 0.0, level)


def mean_of(n: int, value: float, variance: float, level: float = 0.95) -> Interval:
    """Student's t interval of a mean from the ``n``, mean and unbiased variance of a sample; a single one has none."""
    if n < 1:
        raise BadInput("mean_of: n must be at least 1.")
    half = _t(level, n - 1) * math.sqrt(max(variance, 0.0) / n) if n > 1 else math.inf
    return Interval(value, value - half, value + half, n, level)


def welch(first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray, level: float = 0.95) -> Interval:
    """Difference of the means of two independent samples (Welch 1947), each of two values or more."""
    one, two = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if min(one.size, two.size) < 2:
        raise BadInput(f"welch: got {one.size} and {two.size} values; both need at least 2.")
    u, v = one.var(ddof=1) / one.size, two.var(ddof=1) / two.size
    value = float(one.mean() - two.mean())
    freedom = (u + v) ** 2 / (u * u / (one.size - 1) + v * v / (two.size - 1)) if u + v > 0 else 1.0
    half = _t(level, freedom) * math.sqrt(u + v)
    return Interval(value, value - half, value + half, min(one.size, two.size), level)


def bootstrap(
    *samples: Sequence[float] | np.ndarray,
    statistic: Callable[..., np.ndarray] | None = None,
    paired: bool = False,
    draws: int = 4000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of ``statistic`` (default: the mean of the one sample).

    ``statistic`` receives, for every sample, an array (draws, n) of resampled values and returns (draws,); called with
    (1, n) it gives the estimate itself. ``paired`` resamples the same rows of every sample. The p-value is twice the
    smaller share of draws on either side of 0, never below 2 / draws.
    """
    arrays = [np.asarray(sample, dtype=np.float64) for sample in samples]
    if not arrays or any(array.ndim != 1 or array.size == 0 for array in arrays):
        raise BadInput("bootstrap: every sample must be a non-empty one-dimensional sequence of numbers.")
    if paired and len({array.size for array in arrays}) != 1:
        raise BadInput(f"bootstrap: paired samples differ in length: {[array.size for array in arrays]}.")
    if statistic is None:
        if len(arrays) != 1:
            raise BadInput(f"bootstrap: name a statistic for {len(arrays)} samples; the default is the mean of one.")
        statistic = _mean
    rng = np.random.default_rng(seed)
    estimate = float(statistic(*[array[None] for array in arrays])[0])
    rows = None
    resampled = []
    for array in arrays:
        if rows is None or not paired:
            rows = rng.integers(array.size, size=(draws, array.size))
        resampled.append(array[rows])
    values = statistic(*resampled)
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    tail = min(float(np.mean(values <= 0)), float(np.mean(values >= 0)))
    p = float(min(1.0, max(2 * tail, 2 / draws)))
    return Interval(estimate, float(low), float(high), int(arrays[0].size), level, p)


def paired_difference(first: Sequence[float], second: Sequence[float], **options: object) -> Interval:
    """Paired bootstrap of mean(first - second); ``options`` go to :func:`bootstrap`."""
    return bootstrap(first, second, statistic=_difference, paired=True, **options)  # type: ignore[arg-type]


def difference(first: Sequence[float], second: Sequence[float], **options: object) -> Interval:
    """Bootstrap of mean(first) - mean(second) of two independent samples; ``options`` go to :func:`bootstrap`."""
    return bootstrap(first, second, statistic=_difference, **options)  # type: ignore[arg-type]


def ratio(first: Sequence[float], second: Sequence[float], **options: object) -> Interval:
    """Bootstrap of mean(first) / mean(second) of two independent samples; ``options`` go to :func:`bootstrap`.

    The p-value of a ratio is about 0 and says nothing; use :func:`permutation` for "no difference".
    """
    interval = bootstrap(first, second, statistic=_ratio, **options)  # type: ignore[arg-type]
    return Interval(interval.value, interval.low, interval.high, interval.n, interval.level)


def permutation(
    first: Sequence[float], second: Sequence[float], paired: bool = False, draws: int = 10000, seed: int = 0
) -> float:
    """Two-sided p-value of equal means by permutation: labels are shuffled, or signs flipped when ``paired``.

    Uses (extreme + 1) / (draws + 1) (Phipson & Smyth 2010), so it is never 0.
    """
    one, two = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if one.size == 0 or two.size == 0 or (paired and one.size != two.size):
        raise BadInput(f"permutation: got samples of {one.size} and {two.size} values (paired={paired}).")
    rng = np.random.default_rng(seed)
    observed = abs(one.mean() - two.mean())
    extreme = 0
    pooled = one - two if paired else np.concatenate([one, two])
    chunk = max(1, 2_000_000 // pooled.size)
    for start in range(0, draws, chunk):
        count = min(chunk, draws - start)
        if paired:
            means = (pooled * rng.choice([-1.0, 1.0], size=(count, pooled.size))).mean(1)
        else:
            order = rng.permuted(np.broadcast_to(pooled, (count, pooled.size)), axis=1)
            means = order[:, : one.size].mean(1) - order[:, one.size :].mean(1)
        extreme += int(np.sum(np.abs(means) >= observed - 1e-12))
    return (extreme + 1) / (draws + 1)


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median with the first and third quartile, for timings."""
    low, median, high = np.quantile(np.asarray(values, dtype=np.float64), [0.25, 0.5, 0.75])
    return float(median), float(low), float(high)


def _z(level: float) -> float:
    if not 0 < level < 1:
        raise BadInput(f"level={level} is not between 0 and 1.")
    return NormalDist().inv_cdf(0.5 + level / 2)


def _t(level: float, freedom: float) -> float:
    from scipy.special import stdtrit

    if not 0 < level < 1:
        raise BadInput(f"level={level} is not between 0 and 1.")
    return float(stdtrit(freedom, 0.5 + level / 2))


def _mean(sample: np.ndarray) -> np.ndarray:
    return sample.mean(-1)


def _difference(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return first.mean(-1) - second.mean(-1)


def _ratio(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return first.mean(-1) / np.maximum(second.mean(-1), 1e-12)
