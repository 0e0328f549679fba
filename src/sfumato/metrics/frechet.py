"""Frechet distance between two sets of features, from running moments: memory does not grow with the sets.

Dowson & Landau 1982; on Inception features it is the FID of Heusel et al. 2017 (https://arxiv.org/abs/1706.08500). Here
it carries the name of the net whose features it measures, ``FD(toy-clip)``: figures of different nets do not compare.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import scipy.linalg

from sfumato.errors import BadInput


class Moments:
    """Count, mean (d,) and scatter (d, d) of features, in float64, updated batch by batch (Chan et al. 1979)."""

    def __init__(self, d: int):
        self.n, self.mean, self.scatter = 0, np.zeros(d), np.zeros((d, d))

    def add(self, features: np.ndarray) -> Moments:
        """Takes features (b, d) in. Raises BadInput when one of them is not finite."""
        rows = finite(features)
        if rows.shape[1] != len(self.mean):
            raise BadInput(f"features have {rows.shape[1]} numbers each; those before had {len(self.mean)}.")
        if len(rows):
            mean = rows.mean(0)
            self._merge(len(rows), mean, (rows - mean).T @ (rows - mean))
        return self

    def merge(self, other: Moments) -> Moments:
        """Takes in the moments of another set."""
        if other.n:
            self._merge(other.n, other.mean, other.scatter)
        return self

    def _merge(self, n: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        total, gap = self.n + n, mean - self.mean
        self.scatter = self.scatter + scatter + np.outer(gap, gap) * (self.n * n / total)
        self.mean = self.mean + gap * (n / total)
        self.n = total

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased covariance (d, d). Raises BadInput for fewer than two samples."""
        if self.n < 2:
            raise BadInput(f"a Frechet distance needs at least 2 pictures on each side; got {self.n}.")
        return self.scatter / (self.n - 1)

    def state(self) -> dict[str, np.ndarray]:
        """Arrays to store; :meth:`restore` is the inverse."""
        return {"n": np.array([self.n]), "mean": self.mean, "scatter": self.scatter}

    @classmethod
    def restore(cls, state: Mapping[str, np.ndarray]) -> Moments:
        """The moments that :meth:`state` described."""
        made = cls(len(state["mean"]))
        made.n, made.mean, made.scatter = int(state["n"][0]), state["mean"].copy(), state["scatter"].copy()
        return made


def finite(features: np.ndarray) -> np.ndarray:
    """Features (b, d) in float64, whatever precision they were computed in. Raises BadInput on NaN or infinity."""
    rows = np.asarray(features, dtype=np.float64)
    if rows.ndim != 2:
        raise BadInput(f"features have shape {rows.shape}; they must be (pictures, numbers).")
    if not np.isfinite(rows).all():
        first = int(np.flatnonzero(~np.isfinite(rows).all(1))[0])
        raise BadInput(f"the features of picture {first} are not finite; compute them in float32 (dtype='float32').")
    return rows


def frechet(first: Moments, second: Moments) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), of Gaussians with these moments.

    The trace of the root is the sum of the singular values of S1^(1/2) S2^(1/2): symmetric factors only, so that the
    singular covariances of fewer pictures than numbers need neither an offset nor complex arithmetic.
    """
    if len(first.mean) != len(second.mean):
        raise BadInput(f"features of {len(first.mean)} and {len(second.mean)} numbers cannot be compared.")
    one, two = first.covariance, second.covariance
    cross = scipy.linalg.svdvals(_root(one) @ _root(two)).sum()
    gap = first.mean - second.mean
    return float(max(gap @ gap + np.trace(one) + np.trace(two) - 2 * cross, 0.0))


def _root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = scipy.linalg.eigh(covariance)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T
