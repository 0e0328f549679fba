"""Perturbation: is what an explanation calls important what the model needs?

Parts of the input are removed in the order of their relevance and the model is asked again: *positive* removes the most
relevant first (a good map makes the score drop at once: low area under the curve), *negative* the least relevant first
(a good map keeps the score up: high area). Chefer et al. 2021 (arXiv 2012.09838, section 4) for pixels, 2103.15679 for
tokens and boxes.

The core knows no model: parts are numbered, and ``score`` says how the model does without some of them.

    >>> score = pixel_score(lambda x, rows: model(x).logits[range(len(x)), labels[rows]], images, fill=empty_scenes)
    >>> curves = perturb(score, maps.flatten(1))
    >>> curves["positive"].auc, curves["negative"].auc
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.errors import BadInput, UnknownName
from sfumato.markup import described
from sfumato.metrics import stats

FRACTIONS = tuple(round(0.1 * k, 1) for k in range(1, 10))
ORDERS = ("positive", "negative")

#: takes which parts are gone, bool (n, parts), and says how the model does on each sample, (n,)
Score = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Curve:
    """Scores of each sample after each share of its parts was removed: ``scores`` (n, len(fractions))."""

    order: str
    fractions: tuple[float, ...]
    scores: Tensor

    __repr__ = described

    @property
    def areas(self) -> tuple[float, ...]:
        """Area under each sample's curve by trapezoids, divided by the range of the fractions: a mean score."""
        x = torch.tensor(self.fractions, dtype=torch.float64)
        area = torch.trapezoid(self.scores.double(), x, dim=1) / (x[-1] - x[0])
        return tuple(area.tolist())

    @property
    def auc(self) -> stats.Interval:
        """Mean area with its bootstrap interval."""
        return stats.bootstrap(self.areas)

    def to_json(self) -> dict[str, object]:
        """The mean curve and its area."""
        mean = self.scores.double().mean(0).tolist()
        return {"order": self.order, "fractions": list(self.fractions), "mean": mean, "auc": self.auc.to_json()}


def ranks(relevance: Tensor, order: str, fixed: Tensor | None = None, seed: int = 0) -> Tensor:
    """When each part is removed, int64 (n, parts): 0 first. Parts that are ``fixed`` (bool) come last.

    Equal relevances are ordered at random (``seed``; by sample, whatever else is in the batch), not by position: a
    constant map is a random one.
    """
    if order not in ORDERS:
        raise UnknownName("order of perturbation", order, ORDERS)
    if relevance.ndim != 2 or not relevance.numel():
        raise BadInput(f"perturbation: relevance must be (n, parts), got {tuple(relevance.shape)}.")
    if not torch.isfinite(relevance).all():
        raise BadInput("perturbation: relevance holds numbers that are not finite.")
    n, parts = relevance.shape
    values = relevance.detach().double().cpu() * (-1 if order == "positive" else 1)
    if fixed is not None:
        if fixed.shape != relevance.shape:
            raise BadInput(f"perturbation: fixed has shape {tuple(fixed.shape)}, relevance {tuple(relevance.shape)}.")
        values = values.masked_fill(fixed.cpu().bool(), torch.inf)
    shuffle = torch.stack([torch.randperm(parts, generator=torch.Generator().manual_seed(seed + i)) for i in range(n)])
    first = values.gather(1, shuffle).argsort(dim=1, stable=True)
    removal = shuffle.gather(1, first)
    return torch.empty_like(removal).scatter_(1, removal, torch.arange(parts).expand(n, parts).contiguous())


def perturb(
    score: Score,
    relevance: Tensor,
    fractions: Sequence[float] = FRACTIONS,
    fixed: Tensor | None = None,
    seed: int = 0,
) -> dict[str, Curve]:
    """Both curves, by order.

    Args:
        score: how the model does without some parts; called once for every fraction and order.
        relevance: (n, parts) of pixels, patches, boxes or tokens.
        fractions: shares of the removable parts, increasing, from 0 to 1.
        fixed: parts that are never removed (class token, separators, padding), bool (n, parts).

    Raises BadInput for shapes, fractions or relevances that make no sense.
    """
    steps = tuple(float(f) for f in fractions)
    if len(steps) < 2 or not all(0 <= a < b <= 1 for a, b in zip(steps, steps[1:], strict=False)):
        raise BadInput(f"perturbation: fractions must be two or more, increasing, from 0 to 1; got {list(fractions)}.")
    curves = {}
    for order in ORDERS:
        place = ranks(relevance, order, fixed, seed)
        removable = torch.full((len(place), 1), place.shape[1]) if fixed is None else (~fixed.bool().cpu()).sum(1, True)
        scores = [score(place < (share * removable).round()).detach().double().cpu() for share in steps]
        curves[order] = Curve(order, steps, torch.stack(scores, 1))
    return curves


def pixel_score(
    classify: Callable[[Tensor, Tensor], Tensor], images: Tensor, fill: Tensor | float = 0.0, batch: int = 128
) -> Score:
    """A score that removes pixels: they take the value of ``fill``.

    Args:
        classify: ``classify(pixels, rows)`` says how the model does on pictures (b, c, h, w), as (b,): a target's
            probability, or whether it is right. ``rows`` (b,) are their places among the n.
        images: (n, c, h, w).
        fill: a value (0: mid-grey where pictures are in [-1, 1]), or pictures (n, c, h, w), such as the same scenes
            without the thing, which keeps what is left a picture that the model may have seen.
    """
    n, _, h, w = images.shape
    other = fill if isinstance(fill, Tensor) else torch.full_like(images, float(fill))
    if other.shape != images.shape:
        raise BadInput(f"perturbation: fill has shape {tuple(other.shape)}, the pictures {tuple(images.shape)}.")

    def score(gone: Tensor) -> Tensor:
        if gone.shape != (n, h * w):
            raise BadInput(f"perturbation: relevance of {n} pictures of {h} x {w} is needed, got {tuple(gone.shape)}.")
        out = []
        with torch.no_grad():
            for rows in torch.arange(n).split(batch):
                mask = gone[rows].view(-1, 1, h, w).to(images.device)
                out.append(classify(torch.where(mask, other[rows], images[rows]), rows))
        return torch.cat(out)

    return score
