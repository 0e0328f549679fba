"""Faithfulness of explanations: what happens to an answer when the parts said to matter are taken away.

*Positive* perturbation removes the most relevant parts first: a good explanation makes the answer fail early, so the
area under the curve is small. *Negative* removes the least relevant first: the area is large. After Samek et al. 2017
and section 4 of Chefer et al. 2021, whose shares are the default. Pixels, patches, boxes and words alike: the caller
says what removing means.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.judge import stats

#: shares of the parts that are removed
SHARES = (0.0, 0.25, 0.5, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
#: shares for pictures, where the answer is usually lost long before everything is
PIXEL_SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Curve:
    """Scores (samples, shares) after removal; ``auc`` is the mean area under the curves, over the range of shares."""

    shares: tuple[float, ...]
    scores: tuple[tuple[float, ...], ...]
    auc: stats.Interval

    @property
    def areas(self) -> list[float]:
        """One area per sample, for paired tests."""
        return [area(self.shares, row) for row in self.scores]

    def mean(self) -> list[float]:
        """Mean score at each share."""
        return torch.tensor(self.scores).mean(0).tolist()


def area(shares: Sequence[float], scores: Sequence[float]) -> float:
    """Area under one curve by the trapezium rule, divided by the width of its range: a constant 1 has area 1."""
    steps = zip(shares, shares[1:], scores, scores[1:], strict=False)
    return sum((b - a) * (low + high) / 2 for a, b, low, high in steps) / (shares[-1] - shares[0])


def kept(relevance: Tensor, share: float, first: str = "positive", valid: Tensor | None = None) -> Tensor:
    """Which parts (b n) bool stay when this share of the ``valid`` ones is removed, the most relevant first
    ("positive") or the least relevant first ("negative"). Equal relevance: the part that comes first is kept longest.

    The number removed is rounded to the nearest; parts that are not valid always stay.
    """
    if first not in ("positive", "negative"):
        raise BadInput(f"first={first!r} is no order; allowed: 'positive', 'negative'.")
    if not 0 <= share <= 1:
        raise BadInput(f"share is {share}, but it must be from 0 to 1.")
    if relevance.dim() != 2:
        raise BadInput(f"relevance has shape {tuple(relevance.shape)}; (b n) is expected.")
    valid = torch.ones_like(relevance, dtype=torch.bool) if valid is None else valid
    worth = relevance.double() if first == "positive" else -relevance.double()
    worth = worth.masked_fill(~valid, float("-inf"))  # never removed
    order = worth.flip(1).argsort(dim=1, descending=True, stable=True)
    order = relevance.shape[1] - 1 - order  # among equals the last goes first
    rank = torch.empty_like(order)
    rank.scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    gone = (share * valid.sum(1, keepdim=True)).round()
    return (rank >= gone) | ~valid


def curve(
    relevance: Tensor,
    score: Callable[[Tensor], Sequence[float] | Tensor],
    first: str = "positive",
    shares: Sequence[float] = SHARES,
    valid: Tensor | None = None,
    seed: int = 0,
) -> Curve:
    """The curve of ``score(keep)`` (b,), keep (b n) bool, as more and more parts are removed.

    ``relevance`` (b n); ``shares`` ascending. Raises BadInput for fewer than two shares.
    """
    if len(shares) < 2 or list(shares) != sorted(set(shares)):
        raise BadInput(f"shares are {tuple(shares)}; at least two, ascending, are needed.")
    columns = [torch.as_tensor(score(kept(relevance, share, first, valid))).double() for share in shares]
    scores = torch.stack(columns, 1)
    areas = [area(shares, row) for row in scores.tolist()]
    rows = tuple(tuple(row) for row in scores.tolist())
    return Curve(tuple(shares), rows, stats.bootstrap(areas, seed=seed))


def without(images: Tensor, keep: Tensor, fill: Tensor | float = 0.0) -> Tensor:
    """Pictures (b 3 h w) whose cells that are not in ``keep`` (b, cells) of a square grid become ``fill``."""
    side = round(keep.shape[1] ** 0.5)
    h, w = images.shape[-2:]
    if side * side != keep.shape[1] or h % side or w % side:
        raise BadInput(f"{keep.shape[1]} cells do not form a square grid over pictures of {w}x{h}.")
    mask = keep.view(-1, 1, side, side).repeat_interleave(h // side, 2).repeat_interleave(w // side, 3)
    return torch.where(mask, images, torch.as_tensor(fill, dtype=images.dtype, device=images.device))
