"""Arrays on disk whose rows are made when they are first asked for: a training begins before all its data is there.

Rows are computed in batches of one size, the wanted ones first and filled up with the next that are missing, so that
nothing is computed twice; what is made stays, also when the program is stopped. Several processes may work on the same
files: they would write the same bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PART = 64  # rows of one batch


@dataclass(frozen=True)
class Spec:
    """One array: its file when it is whole, and the shape and type of its rows."""

    file: Path
    shape: tuple[int, ...]
    dtype: Any


class Store:
    """Arrays of ``n`` rows, made by ``make(rows)``, which returns one array by each name of ``specs``.

    While rows are missing, all lies in the folder ``unfinished``. ``make`` always gets :data:`PART` rows, those of the
    last part as many as that has: a computation whose last bits depend on the size of its batch gives what it gives
    when all is made in order.
    """

    def __init__(
        self,
        n: int,
        specs: Mapping[str, Spec],
        unfinished: Path,
        make: Callable[[np.ndarray], Mapping[str, np.ndarray]],
    ):
        self.n, self.specs, self.unfinished, self.make = n, dict(specs), unfinished, make
        self.missing: np.ndarray = np.zeros(n, bool)
        self.arrays: dict[str, Any] = {}
        self._made: Any = None
        if all(spec.file.is_file() for spec in self.specs.values()):
            self._load()
            return
        unfinished.mkdir(parents=True, exist_ok=True)
        self._made = _opened(unfinished / "made.npy", (n,), np.uint8)
        for key, spec in self.specs.items():
            self.arrays[key] = _opened(unfinished / spec.file.name, (n, *spec.shape), spec.dtype)
        self._look()

    def rows(self, name: str) -> StoredRows:
        """The array ``name``, whose rows are made when they are read."""
        return StoredRows(self, name)

    def ensure(self, rows: np.ndarray) -> None:
        """Makes what is missing of ``rows``."""
        if self._made is None or not self.missing[rows].any():
            return
        self._look()  # another process may have made them
        border = self.n // PART * PART
        for low, high in ((0, border), (border, self.n)):
            wanted = np.unique(rows[(rows >= low) & (rows < high)])
            wanted = wanted[self.missing[wanted]]
            while len(wanted):
                size = min(PART, high - low)
                others = np.setdiff1d(np.flatnonzero(self.missing[low:high]) + low, wanted)[
                    : max(0, size - len(wanted))
                ]
                chosen = np.concatenate([wanted[:size], others])
                spare = np.full(size - len(chosen), chosen[0])  # nothing else is missing: one is made again
                made = self.make(np.concatenate([chosen, spare]))
                for key, array in self.arrays.items():
                    array[chosen] = made[key][: len(chosen)]
                    array.flush()
                self._made[chosen] = 1
                self.missing[chosen] = False
                wanted = wanted[size:]
        if not self.missing.any():
            self._finish()

    def fill(self, on_progress: Callable[[int, int], None] | None = None) -> None:
        """Makes all that is missing, in order."""
        while self._made is not None:
            self.ensure(np.flatnonzero(self.missing)[:PART])
            if on_progress:
                on_progress(self.n - int(self.missing.sum()), self.n)

    def _look(self) -> None:
        self.missing = np.asarray(self._made) == 0
        if not self.missing.any():
            self._finish()

    def _finish(self) -> None:
        self._made = None
        with contextlib.suppress(OSError):  # whatever another process has done already
            (self.unfinished / "made.npy").unlink()  # first: arrays without it are made anew, never taken for whole
            for spec in self.specs.values():
                spec.file.parent.mkdir(parents=True, exist_ok=True)
                (self.unfinished / spec.file.name).replace(spec.file)
            self.unfinished.rmdir()
        with contextlib.suppress(OSError):
            self._load()

    def _load(self) -> None:
        self.arrays = {key: np.load(spec.file, mmap_mode="r") for key, spec in self.specs.items()}


def _opened(path: Path, shape: tuple[int, ...], dtype: Any) -> Any:
    """The array in ``path``, created where it is not there or is another one's."""
    with contextlib.suppress(OSError, ValueError):
        found = np.load(path, mmap_mode="r+")
        if found.shape == shape and found.dtype == dtype:
            return found
    return np.lib.format.open_memmap(path, "w+", dtype, shape)


class StoredRows:
    """One array of a :class:`Store`, read as numpy reads."""

    def __init__(self, store: Store, name: str):
        self.store, self.name = store, name
        array = store.arrays[name]
        self.shape, self.dtype, self.ndim = array.shape, array.dtype, array.ndim

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, at: Any) -> np.ndarray:
        first = at[0] if isinstance(at, tuple) else at
        self.store.ensure(np.atleast_1d(np.arange(len(self))[first]))
        return self.store.arrays[self.name][at]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        self.store.fill()
        found = self.store.arrays[self.name]
        return np.array(found, dtype=dtype, copy=True) if copy or dtype is not None else np.asarray(found)
