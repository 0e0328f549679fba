"""Geometry of vectors and of the spaces they span: arcs, angles between subspaces, means on the Grassmannian.

Distances and means of subspaces after Park, Kwon, Choi, Jo, Uh 2023, section 3, and Edelman, Arias, Smith 1998.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.arrays import to_tensor
from sfumato.errors import BadInput

__all__ = [
    "curvedness",
    "frechet_mean",
    "geodesic_distance",
    "hungarian_mean",
    "mean_directions",
    "principal_angles",
    "slerp",
    "spectrum",
    "spherical_distance",
]


def slerp(a: Tensor, b: Tensor, share: float, *, keep_norm: bool = True) -> Tensor:
    """``a`` (b ...) turned towards ``b`` by ``share`` of the angle between them, per sample, in float32.

    ``keep_norm``: ``b`` first takes the norm of ``a``; else the norm goes from the one to the other. Where the two
    (anti)align a straight line stands in for the arc.
    """
    one, other = a.flatten(1).float(), b.flatten(1).float()
    if keep_norm:
        norm, length = one.norm(dim=1, keepdim=True), other.norm(dim=1, keepdim=True)
        tiny = torch.finfo(one.dtype).tiny
        other = other * (norm / length.clamp_min(tiny))
        cosine = ((one * other).sum(1, keepdim=True) / norm.square().clamp_min(tiny)).clamp(-1, 1)
    else:
        cosine = F.cosine_similarity(one, other)[:, None].clamp(-1, 1)
    angle = cosine.acos()
    sine = angle.sin()
    straight = sine < 1e-4
    safe = torch.where(straight, torch.ones_like(sine), sine)
    first = torch.where(straight, torch.full_like(sine, 1 - share), ((1 - share) * angle).sin() / safe)
    second = torch.where(straight, torch.full_like(sine, share), (share * angle).sin() / safe)
    return (first * one + second * other).view(a.shape).to(a.dtype)


def spherical_distance(a: Tensor, b: Tensor) -> Tensor:
    """2 arcsin^2(|a - b| / 2) of unit vectors (... d): half the squared angle, so that its gradient does not vanish at
    right angles as a cosine's grows flat at none (Crowson's guided diffusion; MGAD's distance)."""
    half = ((a - b).square().sum(-1) / 4).clamp(1e-12, 1 - 1e-6).sqrt()  # finite gradients at 0 and at opposite poles
    return 2 * half.asin().square()


# -- subspaces ---------------------------------------------------------------------------------------------------------


def principal_angles(a: Tensor, b: Tensor) -> Tensor:
    """Angles in radians between the spans of rows ``a`` (n d) and ``b`` (m d), n <= m, from the smallest; in float64 on
    the CPU."""
    from scipy.linalg import subspace_angles

    one, other = (_exact(rows.detach()).numpy().T for rows in (a, b))
    return to_tensor(subspace_angles(one, other)[::-1].copy())


def _exact(x: Tensor) -> Tensor:
    """In float64, which not every accelerator has."""
    return x.cpu().double()


def geodesic_distance(a: Tensor, b: Tensor) -> float:
    """Distance on the Grassmannian between the tangent spaces spanned by orthonormal rows (n d): the root of the sum of
    squared principal angles. Raises BadInput for spaces of different dimension, which cannot be compared."""
    if a.shape != b.shape:
        raise BadInput(
            f"tangent spaces of {tuple(a.shape)} and {tuple(b.shape)} cannot be compared; use one n and layer."
        )
    return float(principal_angles(a, b).square().sum().sqrt())


def spectrum(v: Tensor, bins: int | None = None) -> Tensor:
    """The power (n r) of directions ``v`` (n c h w) by radial frequency, summed over channels, as shares of their sum
    (float64, on the CPU).

    Ring r holds the frequencies nearest to r cycles along the shorter side; corners beyond its half go to the last.
    """
    h, w = v.shape[-2:]
    side = min(h, w)
    bins = side // 2 + 1 if bins is None else bins
    power = torch.fft.fft2(_exact(v)).abs().square().sum(1)
    y, x = torch.fft.fftfreq(h)[:, None] * side, torch.fft.fftfreq(w)[None] * side
    ring = (y.square() + x.square()).sqrt().round().long().clamp_max(bins - 1).flatten()
    rings = torch.zeros(len(v), bins, dtype=power.dtype)
    rings.index_add_(1, ring, power.flatten(1))
    return rings / rings.sum(1, keepdim=True)


def curvedness(spaces: Sequence[Tensor]) -> float:
    """How curved a path is along which these tangent spaces (n d) lie: the length of the way through all of them over
    the distance of its ends; 1 is flat."""
    if len(spaces) < 3:
        raise BadInput(f"curvedness needs at least 3 tangent spaces along a path, not {len(spaces)}.")
    whole = geodesic_distance(spaces[0], spaces[-1])
    if whole < 1e-9:
        raise BadInput("curvedness: the two ends of the path have the same tangent space.")
    return sum(geodesic_distance(a, b) for a, b in zip(spaces, spaces[1:], strict=False)) / whole


def mean_directions(bases: Sequence[Tensor], by: Literal["frechet", "hungarian"] = "frechet") -> Tensor:
    """Global directions (n d) of local ones (each n d)."""
    return frechet_mean(bases) if by == "frechet" else hungarian_mean(bases)


def frechet_mean(spaces: Sequence[Tensor], iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The Karcher mean of tangent spaces (n d) on the Grassmannian, as orthonormal rows, turned to agree best with the
    given bases (Procrustes)."""
    mean, *others = (_exact(space).T for space in (spaces[0], *spaces))
    for _ in range(iterations):
        step = torch.stack([_log(mean, other) for other in others]).mean(0)
        mean = _exp(mean, step)
        if step.norm() < tolerance:
            break
    turn = torch.stack([mean.T @ _aligned(other.T, mean.T).T for other in others]).mean(0)
    left, _, right = torch.linalg.svd(turn)
    return (mean @ left @ right).T.to(spaces[0])


def hungarian_mean(bases: Sequence[Tensor], iterations: int = 20) -> Tensor:
    """Directions matched one to one across bases (n d) by |cosine|, their signs made equal, averaged, and made
    orthonormal again in order."""
    exact = [_exact(basis) for basis in bases]
    mean = exact[0]
    for _ in range(iterations):
        before = mean
        total = torch.stack([_aligned(basis, mean) for basis in exact]).mean(0)
        q, r = torch.linalg.qr(total.T)
        mean = (q * torch.where(r.diagonal() < 0, -1.0, 1.0)).T
        if (mean - before).norm() < 1e-9 * math.sqrt(len(mean)):
            break
    return mean.to(bases[0])


def _aligned(basis: Tensor, to: Tensor) -> Tensor:
    """The rows of ``basis`` (n d) in the order and with the signs in which they fit those of ``to`` best."""
    from scipy.optimize import linear_sum_assignment

    cosines = to @ basis.T
    _, columns = linear_sum_assignment(-cosines.abs().numpy())
    picked = torch.as_tensor(columns)
    signs = torch.where(cosines.gather(1, picked[:, None]) < 0, -1.0, 1.0)
    return basis[picked] * signs.to(basis)


def _log(at: Tensor, to: Tensor) -> Tensor:
    """The tangent (d n) at the space ``at`` (d n) that leads to ``to``."""
    inner = at.T @ to
    across = (to - at @ inner) @ torch.linalg.pinv(inner)
    q, s, r = torch.linalg.svd(across, full_matrices=False)
    return q * s.atan() @ r


def _exp(at: Tensor, tangent: Tensor) -> Tensor:
    """Where a geodesic ends that leaves the space ``at`` (d n) along ``tangent``."""
    q, s, r = torch.linalg.svd(tangent, full_matrices=False)
    return torch.linalg.qr(at @ r.T * s.cos() @ r + q * s.sin() @ r).Q
