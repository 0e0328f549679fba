"""Intervals and tests that stand beside every measured number: Wilson, Newcombe, bootstrap, permutation.

Everything takes plain sequences of numbers, is deterministic given ``seed`` and needs only numpy.
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
        """Plain numbers, for a results file."""
        record = {"value": self.value, "low": self.low, "high": self.high, "n": self.n, "level": self.level}
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
    z = _z(level)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # at 0 and n the bound is exact; rounding must not put the estimate outside its own interval
    return Interval(share, min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half)), n, level)


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
    tail = min(np.mean(values <= 0), np.mean(values >= 0))
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


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Two-sided p-value of equal shares in pairs, exact: of the pairs that disagree, each way is as likely (McNemar
    1947, with the binomial distribution for chi squared)."""
    one, two = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if one.size == 0 or one.size != two.size:
        raise BadInput(f"mcnemar: got samples of {one.size} and {two.size} values; pairs are needed.")
    gained, lost = int((one & ~two).sum()), int((two & ~one).sum())
    n = gained + lost
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(min(gained, lost) + 1)) / 2**n)


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median with the first and third quartile, for timings."""
    low, middle, high = np.quantile(np.asarray(values, dtype=np.float64), [0.25, 0.5, 0.75])
    return float(middle), float(low), float(high)


def _z(level: float) -> float:
    if not 0 < level < 1:
        raise BadInput(f"level={level} is not between 0 and 1.")
    return NormalDist().inv_cdf(0.5 + level / 2)


def _mean(sample: np.ndarray) -> np.ndarray:
    return sample.mean(-1)


def _difference(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return first.mean(-1) - second.mean(-1)


def _ratio(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return first.mean(-1) / np.maximum(second.mean(-1), 1e-12)
