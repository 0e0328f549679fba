"""The estimator (section 3.1): how many of a layer's units carry which factor, from pairs that share one factor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sfumato.errors import BadInput, UnknownName
from sfumato.markup import described
from sfumato.metrics.stats import Interval

RESIDUAL = "residual"


@dataclass(frozen=True, eq=False)
class Dimensions:
    """What one layer knows of each factor. All by factor name.

    Attributes:
        d: units. n: pairs of each factor. dead: units that never vary.
        scores: covariance of the pairs, summed over units, as a share of all variance. correlations: its mean per
            unit that varies. information: mean of -1/2 log(1 - rho^2), in nats. Each with its bootstrap interval
            over pairs.
        dimensions: how many units, with "residual". Their sum is d.
        units: the share that each unit has in the score (d,), by which units are ranked.
    """

    d: int
    n: int
    dead: int
    scores: dict[str, Interval]
    correlations: dict[str, Interval]
    information: dict[str, Interval]
    dimensions: dict[str, int]
    units: dict[str, Tensor]

    __repr__ = described

    def ranked(self, factor: str) -> list[int]:
        """Units, those that carry most of ``factor`` first."""
        return self.units[factor].argsort(descending=True, stable=True).tolist()

    def percent(self, factor: str) -> float:
        """Dimensions of a factor as a share of all, in percent."""
        return 100 * self.dimensions[factor] / self.d

    def to_json(self) -> dict[str, Any]:
        """Every figure as plain numbers."""
        kinds = {"scores": self.scores, "correlations": self.correlations, "information": self.information}
        return {
            "d": self.d, "n": self.n, "dead": self.dead, "dimensions": self.dimensions,
            **{kind: {name: value.to_json() for name, value in each.items()} for kind, each in kinds.items()},
            "units": {name: [round(float(v), 6) for v in each] for name, each in self.units.items()},
        }  # fmt: skip


def dimensions_of(d: int, scores: Mapping[str, float]) -> dict[str, int]:
    """``d`` units among the factors and the residual: floor(d softmax(scores, 1)), the residual takes the remainder."""
    raised = {name: math.exp(score) for name, score in scores.items()}
    total = sum(raised.values()) + math.e
    out = {name: math.floor(d * value / total) for name, value in raised.items()}
    return {**out, RESIDUAL: d - sum(out.values())}


def estimate(
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    score: Literal["covariance", "correlation"] = "covariance",
    draws: int = 200,
    seed: int = 0,
) -> Dimensions:
    """Dimensions of factors from units of picture pairs.

    Args:
        pairs: for each factor the units (n d) of the first and of the second pictures; row i is a pair.
        score: what the dimensions come from: the pooled covariance (the authors' code) or the mean correlation.
        draws, seed: of the bootstrap over pairs.

    Raises:
        BadInput: fewer than 3 pairs, shapes that do not fit, values that are not finite, no unit that varies.
    """
    sides = {name: (a.double(), b.double()) for name, (a, b) in pairs.items()}
    if not sides:
        raise BadInput("estimate needs pairs of at least one factor.")
    shape = next(iter(sides.values()))[0].shape
    for name, (a, b) in sides.items():
        if a.shape != shape or b.shape != shape or a.ndim != 2 or len(a) < 3:
            raise BadInput(
                f"pairs of {name!r} have units {tuple(a.shape)} and {tuple(b.shape)}; give 3 or more rows each."
            )
        if not (a.isfinite().all() and b.isfinite().all()):
            raise BadInput(f"units of {name!r} are not finite; compute them in float32.")
    n, d = shape
    everything = torch.cat([side for both in sides.values() for side in both])
    variance = everything.var(0, unbiased=False)
    # constants that float arithmetic blurs are not variation
    varying = variance > 1e-12 * everything.square().mean(0).clamp_min(1e-30)
    if not varying.any():
        raise BadInput(f"none of the {d} units varies; the layer says nothing about these pictures.")
    total = variance[varying].sum()
    rng = torch.Generator().manual_seed(seed)
    rows = [torch.arange(n), *(torch.randint(0, n, (n,), generator=rng) for _ in range(draws))]
    figures: dict[str, tuple[Interval, Interval, Interval]] = {}
    units = {}
    for name, (a, b) in sides.items():
        a, b = a[:, varying], b[:, varying]
        drawn = [_figures(a[row], b[row], total) for row in rows]
        shares = torch.zeros(d, dtype=torch.float64)
        shares[varying] = drawn[0][3]
        units[name] = shares.float()
        figures[name] = tuple(_interval([each[k] for each in drawn], n) for k in range(3))  # type: ignore[assignment]
    scores, correlations, information = ({name: each[k] for name, each in figures.items()} for k in range(3))
    chosen = {"covariance": scores, "correlation": correlations}.get(score)
    if chosen is None:
        raise UnknownName("score", score, ("covariance", "correlation"))
    found = dimensions_of(d, {name: value.value for name, value in chosen.items()})
    return Dimensions(d, n, int((~varying).sum()), scores, correlations, information, found, units)


def _figures(a: Tensor, b: Tensor, total: Tensor) -> tuple[float, float, float, Tensor]:
    """Score, mean correlation, mean information, and the score's share of each unit, of pairs (n d)."""
    centre = (a.mean(0) + b.mean(0)) / 2
    share = ((a - centre) * (b - centre)).mean(0) / total
    a, b = a - a.mean(0), b - b.mean(0)
    spread = (a.square().mean(0) * b.square().mean(0)).sqrt()
    rho = torch.where(spread > 0, (a * b).mean(0) / spread.clamp_min(1e-300), torch.zeros_like(spread))
    bound = -0.5 * torch.log1p(-rho.square().clamp_max(1 - 1e-12))
    return float(share.sum()), float(rho.mean()), float(bound.mean()), share


def _interval(values: list[float], n: int) -> Interval:
    drawn = np.array(values[1:] or values[:1])
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(values[0], float(min(low, values[0])), float(max(high, values[0])), n, 0.95)
