"""A reservoir sample of rows: at most so many of any number, the same whatever their order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Reservoir:
    """At most ``cap`` rows, drawn evenly from all that are added: those whose index hashes lowest with the seed.

    Which rows are kept depends on the seed and the indices only, not on the order or on batches, and a larger cap keeps
    a superset (bottom-k sampling, Cohen & Kaplan 2007).
    """

    def __init__(self, d: int, cap: int, seed: int = 0):
        self.cap, self.seed = cap, seed
        self.indices: np.ndarray = np.zeros(0, np.int64)
        self.rows: np.ndarray = np.zeros((0, d), np.float32)

    def add(self, indices: Sequence[int] | np.ndarray, rows: np.ndarray) -> None:
        """Offers rows (b, d) with their indices in the folder."""
        self.indices = np.concatenate([self.indices, np.asarray(indices, np.int64)])
        self.rows = np.concatenate([self.rows, np.asarray(rows, np.float32)])
        if len(self.indices) > self.cap:
            keep = np.sort(np.argsort(_hashed(self.indices, self.seed), kind="stable")[: self.cap])
            self.indices, self.rows = self.indices[keep], self.rows[keep]


def _hashed(indices: np.ndarray, seed: int) -> np.ndarray:
    """splitmix64 of the indices, as pseudorandom priorities."""
    with np.errstate(over="ignore"):
        z = indices.astype(np.uint64) + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x1234567) % 2**64)
        z = (z + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
