"""The rules by which functions hand relevance back (Chefer, Gur and Wolf 2021, arXiv 2012.09838, section 3.1), each as
the backward pass of an autograd function; :mod:`sfumato.relevance.propagation` says which rule serves which function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.markup import described

__all__ = [
    "ZBetaRule",
    "ProductRule",
    "RelevanceRecord",
    "Rules",
    "ProportionalRule",
    "SumRule",
    "IdentityRule",
    "AlphaBetaRule",
    "totals",
]


@dataclass(frozen=True)
class Rules:
    """Which rules.

    Attributes:
        alpha: weight of what speaks for the output; alpha - 1 is the weight of what speaks against it.
        linear: "alpha_beta", or "epsilon": in proportion to signed contributions, bias included.
        normalise: sums keep their total relevance (equation 9); False is plain LRP.
        eps: added to a denominator, away from zero.
        bounds: z-beta at the first convolution: "data" takes each picture's own extremes, as the authors' code does;
            (low, high) those of all pictures; None treats it as any other layer.
    """

    alpha: float = 1.0
    linear: str = "alpha_beta"
    normalise: bool = True
    eps: float = 1e-9
    bounds: str | tuple[float, float] | None = "data"

    def __post_init__(self):
        if self.linear not in ("alpha_beta", "epsilon"):
            raise BadInput(f"rule for linear layers {self.linear!r}; allowed: 'alpha_beta', 'epsilon'.")
        if not self.alpha >= 1:
            raise BadInput(f"alpha of a relevance rule must be 1 or more, got {self.alpha}.")


@dataclass(frozen=True)
class RelevanceRecord:
    """What one function did with relevance: per sample, how much came (``given``) and how much it handed on
    (``passed``); ``peak`` the largest single value, ``negative`` the share of negative relevance."""

    path: str
    op: str
    given: Tensor
    passed: Tensor
    peak: float
    negative: float

    __repr__ = described

    @property
    def error(self) -> float:
        """Largest relative loss or gain over samples."""
        scale = self.given.abs().clamp_min(1e-12)
        return float(((self.passed - self.given).abs() / scale).max())


class IdentityRule(torch.autograd.Function):
    """Relevance goes through as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, op: Callable, note: Callable) -> Tensor:
        ctx.note, ctx.kind, ctx.shape = note, x.dtype, x.shape
        out = op(x.detach())
        return out.clone() if out is x or out.data_ptr() == x.data_ptr() else out

    @staticmethod
    def backward(ctx: Any, r: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        back = _reduced(r.to(ctx.kind), ctx.shape)
        ctx.note(r, (back,))
        return back, None, None


class AlphaBetaRule(torch.autograd.Function):
    """alpha-beta: what contributes positively takes ``alpha`` of the relevance, in proportion, what contributes
    negatively 1 - ``alpha``. The bias takes part in nothing. Epsilon: all in proportion to signed contributions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, op: Callable, back: Callable, rules: Rules, note):
        ctx.save_for_backward(x, w)
        ctx.op, ctx.back, ctx.rules, ctx.note, ctx.b = op, back, rules, note, b
        return op(x, w, b)

    @staticmethod
    def backward(ctx: Any, r: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x, w), rules, op, back = ctx.saved_tensors, ctx.rules, ctx.op, ctx.back
        if rules.linear == "epsilon":
            share = x * back(_divided(r, op(x, w, ctx.b), rules.eps), w)
        else:
            share = rules.alpha * _share(x, r, w.clamp_min(0), w.clamp_max(0), op, back, rules.eps)
            if rules.alpha != 1:
                against = _share(x, r, w.clamp_max(0), w.clamp_min(0), op, back, rules.eps)
                share = share - (rules.alpha - 1) * against
        ctx.note(r, (share,))
        return share, None, None, None, None, None, None


def _share(x: Tensor, r: Tensor, first: Tensor, second: Tensor, op: Callable, back: Callable, eps: float) -> Tensor:
    """``r`` handed to x in proportion to the terms x+ first and x- second."""
    up, down = x.clamp_min(0), x.clamp_max(0)
    s = _divided(r, op(up, first) + op(down, second), eps)
    return up * back(s, first) + down * back(s, second)


class ZBetaRule(torch.autograd.Function):
    """z-beta (deep Taylor for inputs between bounds): contributions are counted from the bounds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, op: Callable, back: Callable, rules: Rules, note):
        ctx.save_for_backward(x, w)
        ctx.op, ctx.back, ctx.rules, ctx.note = op, back, rules, note
        return op(x, w, b)

    @staticmethod
    def backward(ctx: Any, r: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x, w), rules = ctx.saved_tensors, ctx.rules
        if rules.bounds == "data":
            low, high = (bound.expand_as(x) for bound in (x.amin((1, 2, 3), True), x.amax((1, 2, 3), True)))
        else:
            low, high = (torch.full_like(x, float(bound)) for bound in rules.bounds)
        parts = ((x, w), (-low, w.clamp_min(0)), (-high, w.clamp_max(0)))
        s = _divided(r, sum(ctx.op(value, weight) for value, weight in parts), rules.eps)
        share = sum(value * ctx.back(s, weight) for value, weight in parts)
        ctx.note(r, (share,))
        return share, None, None, None, None, None, None


class ProductRule(torch.autograd.Function):
    """Each factor in proportion; each would get everything, so each gets half."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, v: Tensor, op: Callable, note: Callable) -> Tensor:
        ctx.save_for_backward(u, v)
        ctx.op, ctx.note = op, note
        return op(u.detach(), v.detach())

    @staticmethod
    def backward(ctx: Any, r: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        with torch.enable_grad():
            u, v = (each.detach().requires_grad_(True) for each in ctx.saved_tensors)
            z = ctx.op(u, v)
            pulled = torch.autograd.grad(z, (u, v), _divided(r, z.detach()))
        shares = tuple(each.detach() * pull / 2 for each, pull in zip((u, v), pulled, strict=True))
        ctx.note(r, shares)
        return (*shares, None, None)


class SumRule(torch.autograd.Function):
    """In proportion; normalised, each summand keeps its sign pattern and gets of the total what its own total is of
    both (their absolute values), so that terms that cancel do not blow relevance up."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, v: Tensor, rules: Rules, note: Callable) -> Tensor:
        ctx.save_for_backward(u, v)
        ctx.rules, ctx.note = rules, note
        return u + v

    @staticmethod
    def backward(ctx: Any, r: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        u, v = ctx.saved_tensors
        s = _divided(r, u + v, ctx.rules.eps)
        shares = [u * s, v * s]
        if ctx.rules.normalise:
            axes = tuple(range(1, r.ndim))
            first, second = (share.sum(axes, keepdim=True) for share in shares)
            total = r.sum(axes, keepdim=True)
            both = first.abs() + second.abs()
            shares = [
                share * _divided(_divided(own.abs(), both) * total, own)
                for share, own in zip(shares, (first, second), strict=True)
            ]
        ctx.note(r, tuple(shares))
        return _reduced(shares[0], u.shape), _reduced(shares[1], v.shape), None, None


class ProportionalRule(torch.autograd.Function):
    """A function of one tensor that only picks or averages: in proportion."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, op: Callable, note: Callable) -> Tensor:
        ctx.save_for_backward(x)
        ctx.op, ctx.note = op, note
        return op(x.detach())

    @staticmethod
    def backward(ctx: Any, r: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_(True)
            z = ctx.op(x)
            [pulled] = torch.autograd.grad(z, x, _divided(r, z.detach()))
        share = x.detach() * pulled
        ctx.note(r, (share,))
        return share, None, None


def _divided(a: Tensor, b: Tensor, eps: float = 1e-9) -> Tensor:
    """a / b with b moved ``eps`` away from zero; 0 where b is 0."""
    return torch.where(b == 0, torch.zeros_like(a), a / torch.where(b < 0, b - eps, b + eps))


def totals(tensor: Tensor, n: int) -> Tensor:
    """Sum over everything but samples; a tensor that all samples share counts for the first of them."""
    totals = tensor.detach().double().reshape(len(tensor), -1).sum(1)
    return totals if len(totals) == n else F.pad(totals.sum()[None], (0, n - 1))


def _reduced(share: Tensor, shape: torch.Size) -> Tensor:
    """Undoes broadcasting: relevance of a value that was used many times adds up."""
    return share.sum_to_size(shape) if share.shape != shape else share
