"""Matrices with given outputs for some inputs, changed least elsewhere: constrained least squares, in float64.

Kumari et al. 2023 (arXiv 2212.04488), section 3.2. For a matrix W_0 (o d), inputs C_reg (n d) that should be mapped as
before and inputs C (s d) whose images V (s o) are given:

    W = argmin || W C_reg^T - W_0 C_reg^T ||_F^2   so that   W C^T = V^T
      = W_0 + (V^T - W_0 C^T) (D C^T)^-1 D,        D = C (C_reg^T C_reg)^-1

(equation 4 of the paper and its Lagrangian). Text features of a few hundred captions do not span d dimensions: a ridge
lambda = ``ridge`` tr(G) / d on G = C_reg^T C_reg makes it regular and adds lambda ||W - W_0||^2 to what is minimised;
the constraints stay exact. Rows of C that depend on others are left out by a rank-revealing QR.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.markup import described

__all__ = ["LowRank", "Merge", "Solver", "low_rank"]


@dataclass(frozen=True, eq=False)
class Merge:
    """``weight`` (o d) in double precision. ``residual``: largest violation of a constraint over the largest value
    asked for; ``change``: ||W - W_0|| / ||W_0||; ``drift``: ||(W - W_0) C_reg^T|| / ||W_0 C_reg^T||, what is to be
    feared for other prompts."""

    weight: Tensor
    residual: float
    change: float
    drift: float

    __repr__ = described


class Solver:
    """The part that all matrices with the same inputs share.

    Args:
        regular: C_reg (n d). wanted: C (s d). ridge: see the top of this page.

    ``kept``: rows of C that are independent; ``condition``: of G with its ridge.
    """

    def __init__(self, regular: Tensor, wanted: Tensor, ridge: float = 1e-6):
        if regular.ndim != 2 or wanted.ndim != 2 or regular.shape[1] != wanted.shape[1]:
            raise BadInput(f"features {tuple(regular.shape)} and {tuple(wanted.shape)} must be (n, d) and (s, d).")
        if not (ridge > 0 and len(regular) and len(wanted)):
            raise BadInput("the closed form needs captions, targets and a ridge above 0.")
        self.regular = regular.detach().double().cpu()
        self.independent_rows = independent(wanted.detach().double().cpu())
        self.wanted = wanted.detach().double().cpu()[self.independent_rows]
        gram = self.regular.T @ self.regular
        gram.diagonal().add_(ridge * gram.trace() / len(gram))
        self.condition = float(torch.linalg.cond(gram))
        self._d = torch.cholesky_solve(self.wanted.T, torch.linalg.cholesky(gram)).T  # D (s d)
        self._inner = self._d @ self.wanted.T  # D C^T (s s)

    def __call__(self, weight: Tensor, values: Tensor) -> Merge:
        """The matrix for W_0 ``weight`` (o d) and V ``values`` (s o), of all rows of C that were given."""
        own = weight.detach().double().cpu()
        targets = values.detach().double().cpu()[self.independent_rows]
        missing = targets.T - own @ self.wanted.T
        out = own + torch.linalg.solve(self._inner.T, missing.T).T @ self._d
        residual = (out @ self.wanted.T - targets.T).abs().max() / targets.abs().max().clamp_min(1e-30)
        moved = out - own
        drift = (moved @ self.regular.T).norm() / (own @ self.regular.T).norm().clamp_min(1e-30)
        return Merge(out, float(residual), float(moved.norm() / own.norm()), float(drift))


def independent(rows: Tensor, tolerance: float = 1e-9) -> list[int]:
    """Numbers of rows (s d) that depend on no other, in order, by QR with pivoting."""
    from scipy.linalg import qr

    triangle, order = qr(rows.numpy().T, mode="r", pivoting=True)
    diagonal = abs(triangle.diagonal())
    rank = int((diagonal > tolerance * diagonal[0]).sum()) if len(diagonal) and diagonal[0] > 0 else 0
    return sorted(int(i) for i in order[:rank])


@dataclass(frozen=True, eq=False)
class LowRank:
    """A change of a matrix as ``up`` (o r) times ``down`` (r d): a LoRA whose alpha is its rank."""

    up: Tensor
    down: Tensor

    __repr__ = described


def low_rank(change: Tensor, share: float = 0.6) -> LowRank:
    """The largest singular directions of a change (o d): all before the one at which the sum of singular values exceeds
    ``share`` of the whole, at least one (Kumari et al. 2023, appendix; their code drops the crossing one)."""
    if not 0 < share <= 1:
        raise BadInput(f"share must be above 0 and at most 1, got {share:g}.")
    u, s, v = torch.linalg.svd(change.detach().double(), full_matrices=False)
    u, s, v = u[:, s > 1e-7 * s[0]], s[s > 1e-7 * s[0]], v[s > 1e-7 * s[0]]  # the others are rounding
    part = s.cumsum(0) / s.sum().clamp_min(1e-30)
    over = (part > share + 1e-12).nonzero().flatten().tolist()
    rank = min(len(s), max(1, over[0] if over else len(s)))
    return LowRank((u[:, :rank] * s[:rank]).to(change), v[:rank].to(change))
